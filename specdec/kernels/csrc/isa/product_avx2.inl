// One block of the product on AVX2: sixteen outputs against T rows of activations. product.inl has the loop over
// blocks, product_256.inl what unpacks weights.
//
// A product of bytes adds pairs into 16 bits, and the eight of a block are added there too; why that never overflows
// is said below, for each number of bits. Rows go in groups, as many as there are registers for their sums, and weights
// are unpacked once a group. Registers are what runs out here, so two things are not left to the compiler: a sum is
// pinned to its register after each addition, and totals wait in memory from block to block (product.inl). Without
// that, eight rows of 4 bits take twice as long, for moves to the stack and back.

// Nothing is emitted for the empty statement, but the compiler must have the sum at hand there. g++ otherwise moves all
// additions of a block behind all of its products, which wait on the stack meanwhile.
INLINE void pin(__m256i& sum) { __asm__("" : "+x"(sum)); }

// sum += weights * four, where four columns of a row of activations meet those of eight outputs.
INLINE void add_products(__m256i& sum, __m256i weights, __m256i four, bool first = false) {
  const __m256i products = _mm256_maddubs_epi16(weights, four);
  sum = first ? products : _mm256_add_epi16(sum, products);
  pin(sum);
}

// Pairs of 16-bit sums to 32 bits.
INLINE __m256i widened(__m256i sum, int factor = 1) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(factor)); }

// 4 and 5 bits: both halves in one pass, so that one load of activations serves two products. `weights(chunk, half)`: a
// byte a weight. Sums of 4 bits are at most 8 * 2 * 15 * 127. Sums of 5 bits would not fit; but they begin at what an
// offset of 16 makes of them, end within 16 * 16 * 127, and may wrap meanwhile.
template <int R, int BITS, bool MINIMUM, class Weights8>
INLINE void add_rows(const Block& block, const Weights8& weights, F* total) {
  __m256i sum[R][2];
  if (BITS == 5)
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = repeated(block.start + r);
  const auto step = [&](int chunk, bool first = false) INLINE_LAMBDA {
    const __m256i lower = weights(chunk, 0), upper = weights(chunk, 1);
    for (int r = 0; r < R; ++r) {
      const __m256i four = repeated(block.x + 32 * r + 4 * chunk);
      add_products(sum[r][0], lower, four, first);
      add_products(sum[r][1], upper, four, first);
    }
  };
  // no loop: g++ would keep it, and ask each time whether it is the first
  step(0, BITS == 4), step(4), step(1), step(5), step(2), step(6), step(3), step(7);
  for (int half = 0; half < 2; ++half) {
    __m256i dot[R];
    for (int r = 0; r < R; ++r) {
      dot[r] = widened(sum[r][half]);
      if (BITS == 4 && !MINIMUM) dot[r] = _mm256_add_epi32(dot[r], repeated(block.start + r));
      if (BITS == 5 && MINIMUM) dot[r] = _mm256_sub_epi32(dot[r], widened(repeated(block.start + r)));
    }
    add_terms<R, MINIMUM>(block, half, dot, total);
  }
}

// 8 bits: as two nibbles, because pairs of whole bytes would saturate. The sums of both nibbles are kept apart, so that
// there are registers for eight outputs at a time.
template <int R>
INLINE void add_rows_of_bytes(const Block& block, F* total) {
  for (int half = 0; half < 2; ++half) {
    __m256i low[R], high[R], dot[R];
    const auto step = [&](int chunk, bool first = false) INLINE_LAMBDA {
      const __m256i raw = load_bytes(block.q + 64 * chunk + 32 * half);
      const __m256i lower = low_nibbles(raw), upper = high_nibbles(raw);
      for (int r = 0; r < R; ++r) {
        const __m256i four = repeated(block.x + 32 * r + 4 * chunk);
        add_products(low[r], lower, four, first);
        add_products(high[r], upper, four, first);
      }
    };
    step(0, true), step(1), step(2), step(3), step(4), step(5), step(6), step(7);
    for (int r = 0; r < R; ++r)
      dot[r] = _mm256_add_epi32(_mm256_add_epi32(widened(low[r]), widened(high[r], 16)), repeated(block.start + r));
    add_terms<R, false>(block, half, dot, total);
  }
}

template <int T, int BITS, bool MINIMUM>
INLINE void add_block(const Block& block, F (&total)[T]) {
  // 4 bits: sums of six rows fill the registers; 4 + 3 and 4 + 4 are better than 6 + 1 and 6 + 2
  constexpr int kMost = BITS == 4 ? 6 : 4, kFirst = T <= kMost ? T : 4, kRest = T - kFirst;
  const Block rest = block.from(kFirst);
  if constexpr (BITS == 8) {
    add_rows_of_bytes<kFirst>(block, total);
    if constexpr (kRest > 0) add_rows_of_bytes<kRest>(rest, total + kFirst);
  } else if constexpr (BITS == 5) {
    alignas(32) uint8_t bytes[512];  // unpacked once for both groups
    const auto unpack = [&](int chunk, int half) INLINE_LAMBDA {
      const __m256i five = five_bits(block.q, chunk, half);
      if (kRest > 0) _mm256_store_si256((__m256i*)(bytes + 64 * chunk + 32 * half), five);
      return five;
    };
    add_rows<kFirst, 5, MINIMUM>(block, unpack, total);
    const auto unpacked = [&](int chunk, int half) INLINE_LAMBDA { return load_bytes(bytes + 64 * chunk + 32 * half); };
    if constexpr (kRest > 0) add_rows<kRest, 5, MINIMUM>(rest, unpacked, total + kFirst);
  } else {
    const auto unpack = [&](int chunk, int half) INLINE_LAMBDA { return four_bits(block.q, chunk, half); };
    add_rows<kFirst, 4, MINIMUM>(block, unpack, total);
    if constexpr (kRest > 0) add_rows<kRest, 4, MINIMUM>(rest, unpack, total + kFirst);
  }
}
