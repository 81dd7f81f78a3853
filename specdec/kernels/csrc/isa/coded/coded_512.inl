// coded.inl on AVX-512 with VNNI.

// Chunk `chunk` of a block: a byte a weight.
template <class FORM>
INLINE __m512i coded_bytes(const uint8_t* q, int chunk, __m512i table) {
  constexpr bool kNibbles = FORM::bits >= 4, kTwos = FORM::bits != 4;
  __m512i code = _mm512_setzero_si512();
  if (kNibbles) {
    const __m512i raw = _mm512_loadu_si512(q + 64 * (chunk % 4));
    code = _mm512_and_si512(chunk < 4 ? raw : _mm512_srli_epi16(raw, 4), _mm512_set1_epi8(15));
  }
  if (kTwos) {
    const __m512i raw = _mm512_loadu_si512(q + (kNibbles ? 256 : 0) + 64 * (chunk / 4));
    const int right = 2 * (chunk % 4) - (kNibbles ? 4 : 0);
    const __m512i twos = right < 0 ? _mm512_slli_epi16(raw, -right) : _mm512_srli_epi16(raw, right);
    const __m512i mask = _mm512_set1_epi8(kNibbles ? 0x30 : 3);
    code = kNibbles ? _mm512_ternarylogic_epi32(code, twos, mask, 0xf8) : _mm512_and_si512(twos, mask);  // a | b & c
  }
  if (FORM::bits == 3) {
    uint64_t third;
    std::memcpy(&third, q + 128 + 8 * chunk, 8);
    code = _mm512_mask_add_epi8(code, third, code, _mm512_set1_epi8(4));
  }
  return FORM::table ? _mm512_shuffle_epi8(table, code) : code;
}

template <int T, class FORM>
INLINE void add_coded(const Block& block, F (&total)[T]) {
  __m512i table = _mm512_setzero_si512();
  if (FORM::table) table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)block.table));
  __m512i dot[2][T];
  for (int t = 0; t < T; ++t) {
    int32_t start = 0;
    if (!FORM::sub) std::memcpy(&start, block.start + t, 4);
    dot[0][t] = _mm512_set1_epi32(start);
    dot[1][t] = _mm512_setzero_si512();
  }
  const auto step = [&](int chunk) INLINE_LAMBDA {
    const __m512i weights = coded_bytes<FORM>(block.q, chunk, table);
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, block.x + t * 32 + 4 * chunk, 4);
      __m512i& sum = dot[FORM::sub ? chunk / 4 : 0][t];
      sum = _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four));
    }
  };
  step(0), step(4), step(1), step(5), step(2), step(6), step(3), step(7);
  F d = half_to_float(block.scale);
  if (FORM::table) d = d * splat(block.unit);
  F m;
  __m512i first, second, start, low;
  if (FORM::sub) {
    const __m256i raw = _mm256_loadu_si256((const __m256i*)block.sub);
    __m512i pairs = _mm512_cvtepi8_epi16(raw);
    if (FORM::minimum) {
      pairs = _mm512_cvtepu8_epi16(raw);
      low = _mm512_srli_epi16(pairs, 4);
      pairs = _mm512_and_si512(pairs, _mm512_set1_epi16(15));
      m = half_to_float(block.minimum);
    }
    first = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16);
    second = _mm512_srai_epi32(pairs, 16);
    start = _mm512_mullo_epi16(pairs, _mm512_set1_epi16(-FORM::zero));
  }
  for (int t = 0; t < T; ++t) {
    int32_t pair;
    std::memcpy(&pair, block.start + t, 4);
    __m512i whole = dot[0][t];
    if (FORM::sub) {
      whole = _mm512_add_epi32(_mm512_mullo_epi32(whole, first), _mm512_mullo_epi32(dot[1][t], second));
      if (FORM::zero) whole = _mm512_add_epi32(whole, _mm512_madd_epi16(start, _mm512_set1_epi32(pair)));
    }
    F part = (splat(block.activation_scale[t]) * d) * convert(I{{(VI)whole}});
    if (FORM::minimum) {
      const I sums{{(VI)_mm512_madd_epi16(low, _mm512_set1_epi32(pair))}};
      part = part + m * (splat(block.activation_scale[t]) * convert(sums));
    }
    total[t] = total[t] + part;
  }
}
