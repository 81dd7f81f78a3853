// What a block's product does the same way on AVX2 and AVX-VNNI, with vectors of 32 bytes: unpacking weights, and the
// floats after the integers. `half`, 0 or 1: of a block's sixteen outputs.

// Four bytes, eight times.
INLINE __m256i repeated(const void* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

INLINE __m256i low_nibbles(__m256i raw) { return _mm256_and_si256(raw, _mm256_set1_epi8(15)); }
INLINE __m256i high_nibbles(__m256i raw) { return low_nibbles(_mm256_srli_epi16(raw, 4)); }
INLINE __m256i load_bytes(const uint8_t* q) { return _mm256_loadu_si256((const __m256i*)q); }

// Chunk `chunk` of eight outputs of a 4-bit block, a byte a weight.
INLINE __m256i four_bits(const uint8_t* q, int chunk, int half) {
  const __m256i raw = load_bytes(q + 64 * (chunk % 4) + 32 * half);
  return chunk < 4 ? low_nibbles(raw) : high_nibbles(raw);
}

// `value` in the bytes of those of 32 weights whose bits are set at `four`, else zero.
INLINE __m256i where_set(const uint8_t* four, char value) {
  const __m256i bytes = _mm256_shuffle_epi8(
      repeated(four), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(value));
}

// The same of a 5-bit block.
INLINE __m256i five_bits(const uint8_t* q, int chunk, int half) {
  return _mm256_or_si256(four_bits(q, chunk, half), where_set(q + 256 + 8 * chunk + 4 * half, 16));
}

// Adds the terms of eight outputs to the totals of R rows.
template <int R, bool MINIMUM>
INLINE void add_terms(const Block& block, int half, const __m256i (&dot)[R], F* total) {
  const VF d = half_to_float(block.scale).p[half];
  VF m{};
  if (MINIMUM) m = half_to_float(block.minimum).p[half];
  for (int r = 0; r < R; ++r) {
    VF part = (splat(block.activation_scale[r]).p[0] * d) * __builtin_convertvector((VI)dot[r], VF);
    if (MINIMUM) part = part + m * splat(block.term[r]).p[0];
    total[r].p[half] += part;
  }
}
