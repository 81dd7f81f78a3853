// coded.inl on AVX2: eight outputs at a time. Products of bytes are added in pairs to 16 bits, those of some chunks to
// each other, and then multiplied by the scale of their sixteen inputs into the 32-bit sum of the block, in one
// instruction. Chunks that may be added in 16 bits: four where codes have three bits (8 * 7 * 127), two where they have
// six (4 * 63 * 127), none where a table says what they mean (2 * 127 * 127). Without such scales weights may be as far
// from zero as activations: then a sign moves from one to the other.

template <int R, class FORM>
INLINE void add_coded_rows(const Block& block, F* total) {
  constexpr int kChunks = FORM::table ? 1 : FORM::bits == 6 ? 2 : 4;
  __m256i table = table_of(block.table);
  if (!FORM::sub) table = _mm256_xor_si256(table, _mm256_set1_epi8(-128));  // the numbers as they are
  for (int half = 0; half < 2; ++half) {
    __m256i sum[R];
    for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_si256();
    const auto step = [&](int chunk, __m256i scale) INLINE_LAMBDA {
      __m256i weights[kChunks], sizes[kChunks];
      for (int c = 0; c < kChunks; ++c) {
        weights[c] = coded_bytes<FORM>(block.q, chunk + c, half, table);
        sizes[c] = FORM::sub ? weights[c] : _mm256_abs_epi8(weights[c]);
      }
      for (int r = 0; r < R; ++r) {
        __m256i products = _mm256_setzero_si256();
        for (int c = 0; c < kChunks; ++c) {
          __m256i four = repeated(block.x + 32 * r + 4 * (chunk + c));
          if (!FORM::sub) four = _mm256_sign_epi8(four, weights[c]);
          const __m256i pairs = _mm256_maddubs_epi16(sizes[c], four);
          products = c ? _mm256_add_epi16(products, pairs) : pairs;
        }
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(products, scale));
        pin(sum[r]);
      }
    };
    __m256i first = _mm256_set1_epi16(1), second = first;
    if (FORM::sub) {
      const __m256i pairs = pairs_of<FORM>(block, half);
      first = _mm256_or_si256(_mm256_slli_epi32(pairs, 16), _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)));
      second = _mm256_or_si256(_mm256_srli_epi32(pairs, 16), _mm256_andnot_si256(_mm256_set1_epi32(0xffff), pairs));
    }
    step(0, first);
    if (kChunks < 2) step(1, first);
    if (kChunks < 4) step(2, first);
    if (kChunks < 2) step(3, first);
    step(4, second);
    if (kChunks < 2) step(5, second);
    if (kChunks < 4) step(6, second);
    if (kChunks < 2) step(7, second);
    add_coded_terms<R, FORM>(block, half, sum, total);
  }
}

template <int T, class FORM>
INLINE void add_coded(const Block& block, F (&total)[T]) {
  add_coded_rows<T, FORM>(block, total);
}
