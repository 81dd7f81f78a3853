// One block of the product on AVX-VNNI: sixteen outputs against T rows of activations, with the instruction that adds
// four products of bytes to each of eight sums. product.inl has the loop over blocks, product_256.inl what unpacks
// weights. Rows go in groups, as many as there are registers for their sums, and weights are unpacked once a group.

// `weights(chunk, half)`: a byte a weight.
template <int R, bool MINIMUM, class Weights8>
INLINE void add_rows(const Block& block, const Weights8& weights, F* total) {
  __m256i sum[2][R];
  for (int r = 0; r < R; ++r) sum[0][r] = sum[1][r] = MINIMUM ? _mm256_setzero_si256() : repeated(block.start + r);
  const auto step = [&](int chunk) INLINE_LAMBDA {
    const __m256i lower = weights(chunk, 0), upper = weights(chunk, 1);
    for (int r = 0; r < R; ++r) {
      const __m256i four = repeated(block.x + 32 * r + 4 * chunk);
      sum[0][r] = _mm256_dpbusd_avx_epi32(sum[0][r], lower, four);
      sum[1][r] = _mm256_dpbusd_avx_epi32(sum[1][r], upper, four);
    }
  };
  step(0), step(4), step(1), step(5), step(2), step(6), step(3), step(7);
  for (int half = 0; half < 2; ++half) add_terms<R, MINIMUM>(block, half, sum[half], total);
}

template <int T, int BITS, bool MINIMUM>
INLINE void add_block(const Block& block, F (&total)[T]) {
  // sums of six rows fill the registers, but 5 bits take some to unpack
  constexpr int kMost = BITS == 5 ? 4 : 6, kFirst = T <= kMost ? T : 4, kRest = T - kFirst;
  alignas(32) uint8_t bytes[512];  // 5 bits, unpacked once for both groups
  const auto unpack = [&](int chunk, int half) INLINE_LAMBDA {
    if (BITS == 8) return load_bytes(block.q + 64 * chunk + 32 * half);
    if (BITS == 4) return four_bits(block.q, chunk, half);
    const __m256i five = five_bits(block.q, chunk, half);
    if (kRest > 0) _mm256_store_si256((__m256i*)(bytes + 64 * chunk + 32 * half), five);
    return five;
  };
  const auto unpacked = [&](int chunk, int half) INLINE_LAMBDA {
    return BITS == 5 ? load_bytes(bytes + 64 * chunk + 32 * half) : unpack(chunk, half);
  };
  add_rows<kFirst, MINIMUM>(block, unpack, total);
  if constexpr (kRest > 0) add_rows<kRest, MINIMUM>(block.from(kFirst), unpacked, total + kFirst);
}
