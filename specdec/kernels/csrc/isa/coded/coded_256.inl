// What coded.inl does the same way on AVX2 and AVX-VNNI. `half`, 0 or 1: of a block's sixteen outputs.

// Chunk `chunk` of eight outputs of a block: the codes, a byte each.
template <class FORM>
INLINE __m256i codes_of(const uint8_t* q, int chunk, int half) {
  constexpr bool kNibbles = FORM::bits >= 4, kTwos = FORM::bits != 4;
  __m256i code = _mm256_setzero_si256();
  if (kNibbles) code = four_bits(q, chunk, half);
  if (kTwos) {
    const __m256i raw = load_bytes(q + (kNibbles ? 256 : 0) + 64 * (chunk / 4) + 32 * half);
    const int right = 2 * (chunk % 4) - (kNibbles ? 4 : 0);
    const __m256i twos = right < 0 ? _mm256_slli_epi16(raw, -right) : _mm256_srli_epi16(raw, right);
    const __m256i masked = _mm256_and_si256(twos, _mm256_set1_epi8(kNibbles ? 0x30 : 3));
    code = kNibbles ? _mm256_or_si256(code, masked) : masked;
  }
  if (FORM::bits == 3) code = _mm256_or_si256(code, where_set(q + 128 + 8 * chunk + 4 * half, 4));
  return code;
}

// The weights, moved by FORM::zero.
template <class FORM>
INLINE __m256i coded_bytes(const uint8_t* q, int chunk, int half, __m256i table) {
  const __m256i code = codes_of<FORM>(q, chunk, half);
  return FORM::table ? _mm256_shuffle_epi8(table, code) : code;
}

INLINE __m256i table_of(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
}

// Scales of both halves of eight outputs' inputs, 16 bits each side by side; `minimum`: those of the minimum.
template <class FORM>
INLINE __m256i pairs_of(const Block& block, int half, bool minimum = false) {
  const __m128i raw = _mm_loadu_si128((const __m128i*)(block.sub + 16 * half));
  if (!FORM::minimum) return _mm256_cvtepi8_epi16(raw);
  const __m256i pairs = _mm256_cvtepu8_epi16(raw);
  return minimum ? _mm256_srli_epi16(pairs, 4) : _mm256_and_si256(pairs, _mm256_set1_epi16(15));
}

// Adds the terms of eight outputs to the totals of R rows. `dot`: integers without what FORM::zero takes back.
template <int R, class FORM>
INLINE void add_coded_terms(const Block& block, int half, const __m256i (&dot)[R], F* total) {
  VF d = half_to_float(block.scale).p[half];
  if (FORM::table) d = d * splat(block.unit).p[0];
  VF m{};
  __m256i low{}, start{};
  if (FORM::minimum) m = half_to_float(block.minimum).p[half], low = pairs_of<FORM>(block, half, true);
  if (FORM::sub && FORM::zero)
    start = _mm256_mullo_epi16(pairs_of<FORM>(block, half), _mm256_set1_epi16(-FORM::zero));
  for (int r = 0; r < R; ++r) {
    __m256i whole = dot[r];
    if (FORM::sub && FORM::zero) whole = _mm256_add_epi32(whole, _mm256_madd_epi16(start, repeated(block.start + r)));
    const VF s = splat(block.activation_scale[r]).p[0];
    VF part = (s * d) * __builtin_convertvector((VI)whole, VF);
    if (FORM::minimum)
      part = part + m * (s * __builtin_convertvector((VI)_mm256_madd_epi16(low, repeated(block.start + r)), VF));
    total[r].p[half] += part;
  }
}
