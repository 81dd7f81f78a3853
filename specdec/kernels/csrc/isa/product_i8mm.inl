// The integer products of two rows and more on NEON with i8mm, whose instruction adds to four sums the products of two
// rows with two outputs, of eight columns each. product_neon.inl includes this file, and has what comes before and
// after.
//
// Activations lie as the instruction takes them (quantise.inl): eight columns of a row, then the same of the next one.
// An odd last row is its own next one. Weights lie by fours of columns, so two chunks are interleaved to make eights.

// Adds the products of chunks 4 * HALF + J and the one after it, for vectors first .. first + V - 1 of four outputs:
// sum[p][i] has rows 2p and 2p + 1 of the i-th pair of outputs, two outputs of a row beside each other.
template <int BITS, int HALF, int J, int T, int V>
INLINE void add_pair_of_chunks(const uint8_t* q, const int8_t* x, int first, int32x4_t (&sum)[(T + 1) / 2][2 * V]) {
  constexpr int kEights = 2 * HALF + J / 2;
  int8x16_t a[(T + 1) / 2];
  for (int p = 0; p < T / 2; ++p) a[p] = vld1q_s8(x + 64 * p + 16 * kEights);
  if (T % 2) {
    const int8x8_t last = vld1_s8(x + 32 * (T - 1) + 8 * kEights);
    a[T / 2] = vcombine_s8(last, last);
  }
  uint8x16_t fifths = vdupq_n_u8(0);
  if (BITS == 5) fifths = vld1q_u8(q + 256 + 8 * (4 * HALF + J));
  const uint64x2_t bit = vcombine_u64(vcreate_u64(0x0804020108040201), vcreate_u64(0x8040201080402010));
  for (int i = 0; i < 2 * V; ++i) {
    const int v = first + i / 2;
    const uint32x4_t one = vreinterpretq_u32_u8(raw_of<BITS, HALF>(q, J, v));
    const uint32x4_t next = vreinterpretq_u32_u8(raw_of<BITS, HALF>(q, J + 1, v));
    const uint8x16_t raw = vreinterpretq_u8_u32(i % 2 ? vzip2q_u32(one, next) : vzip1q_u32(one, next));
    // byte 2v + i % 2 of each chunk has the fifth bits of both outputs
    const uint64_t bytes = 0x0808080800000000 + uint64_t(2 * v + i % 2) * 0x0101010101010101;
    const uint8x16_t chosen_fifths = vqtbl1q_u8(fifths, vreinterpretq_u8_u64(vdupq_n_u64(bytes)));
    const int8x16_t weights = signed_bytes<BITS, HALF>(raw, chosen_fifths, bit);
    for (int p = 0; p < (T + 1) / 2; ++p) sum[p][i] = vmmlaq_s32(sum[p][i], a[p], weights);
  }
}

// As add_dots; a row's sums in `dot` are all the same before.
template <int BITS, int T, int V>
INLINE void add_paired_dots(const uint8_t* q, const int8_t* x, int first, int32x4_t (&dot)[T][V]) {
  constexpr int kPairs = (T + 1) / 2;
  int32x4_t sum[kPairs][2 * V];
  const auto halves = [](int32x4_t v) INLINE_LAMBDA { return vreinterpretq_s64_s32(v); };
  for (int p = 0; p < kPairs; ++p) {
    const int32x4_t row = dot[2 * p][0], next = dot[2 * p + 1 < T ? 2 * p + 1 : 2 * p][0];
    for (int i = 0; i < 2 * V; ++i) sum[p][i] = vreinterpretq_s32_s64(vzip1q_s64(halves(row), halves(next)));
  }
  __asm__("" : "+r"(x));  // else activations would be kept for the other eight outputs, on the stack
  // both nibbles of the same bytes one after the other
  add_pair_of_chunks<BITS, 0, 0, T, V>(q, x, first, sum);
  add_pair_of_chunks<BITS, 1, 0, T, V>(q, x, first, sum);
  add_pair_of_chunks<BITS, 0, 2, T, V>(q, x, first, sum);
  add_pair_of_chunks<BITS, 1, 2, T, V>(q, x, first, sum);
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) {
      const int64x2_t lower = halves(sum[t / 2][2 * v]), upper = halves(sum[t / 2][2 * v + 1]);
      dot[t][v] = vreinterpretq_s32_s64(t % 2 ? vzip2q_s64(lower, upper) : vzip1q_s64(lower, upper));
    }
}
