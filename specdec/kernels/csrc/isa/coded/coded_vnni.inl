// coded.inl on AVX-VNNI: eight outputs at a time, because the sums of both halves of their inputs are kept apart.

template <int R, class FORM>
INLINE void add_coded_rows(const Block& block, F* total) {
  const __m256i table = table_of(block.table);
  for (int half = 0; half < 2; ++half) {
    __m256i sum[2][R];
    for (int r = 0; r < R; ++r) {
      sum[0][r] = FORM::sub ? _mm256_setzero_si256() : repeated(block.start + r);
      sum[1][r] = _mm256_setzero_si256();
    }
    const auto step = [&](int chunk) INLINE_LAMBDA {
      const __m256i weights = coded_bytes<FORM>(block.q, chunk, half, table);
      for (int r = 0; r < R; ++r) {
        __m256i& dot = sum[FORM::sub ? chunk / 4 : 0][r];
        dot = _mm256_dpbusd_avx_epi32(dot, weights, repeated(block.x + 32 * r + 4 * chunk));
      }
    };
    step(0), step(4), step(1), step(5), step(2), step(6), step(3), step(7);
    if (FORM::sub) {
      const __m256i pairs = pairs_of<FORM>(block, half);
      const __m256i first = _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16), second = _mm256_srai_epi32(pairs, 16);
      for (int r = 0; r < R; ++r)
        sum[0][r] = _mm256_add_epi32(_mm256_mullo_epi32(sum[0][r], first), _mm256_mullo_epi32(sum[1][r], second));
    }
    add_coded_terms<R, FORM>(block, half, sum[0], total);
  }
}

template <int T, class FORM>
INLINE void add_coded(const Block& block, F (&total)[T]) {
  constexpr int kFirst = T <= 6 ? T : 4, kRest = T - kFirst;
  add_coded_rows<kFirst, FORM>(block, total);
  if constexpr (kRest > 0) add_coded_rows<kRest, FORM>(block.from(kFirst), total + kFirst);
}
