// Activations as the product wants them (product.inl), for one instruction set (see simd.inl): a row of K floats to
// int8 blocks. The arithmetic is written down in reference.py.

// Sums of a block's values: of all, and what term[kBy16] and term[kHalves] get.
struct Sums {
  int32_t total, by16, halves;
};

INLINE int32_t pair_of(int32_t lower, int32_t upper) { return int32_t((uint32_t(lower) & 0xffff) | uint32_t(upper) << 16); }

// Stores the 32 values of a block, each within -127..127, as bytes.
INLINE Sums store_values(int8_t* to, I first, I second) {
#if KERNEL_LANES == 8
  const __m256i low = _mm256_packs_epi32((__m256i)first.p[0], (__m256i)first.p[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)second.p[0], (__m256i)second.p[1]);
  // packing works on both 128-bit halves apart: fours of values come out as 0, 2, 4, 6, 1, 3, 5, 7
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256((__m256i*)to, bytes);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
  const int32_t pair = _mm_cvtsi128_si32(sum), total = int16_t(pair) + (pair >> 16);
  const int32_t pair_by16 = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(-16)));
  __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));  // of the first sixteen values, of the others
  fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4e));
  fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
  const int32_t lower = _mm_cvtsi128_si32(_mm256_castsi256_si128(fours));
  return Sums{total, KERNEL_ISA == ISA_AVX2 ? pair_by16 : -16 * total, pair_of(lower, total - lower)};
#else
  store_bytes(to, first);
  store_bytes(to + 16, second);
  const int32_t lower = sum(first), upper = sum(second), total = lower + upper;
  return Sums{total, -16 * total, pair_of(lower, upper)};
#endif
}

// Writes row r of `tile`: values at [b][r][32], scale at [b][r], and what a block adds beside its products at
// [b][r] of `term`, one array per kind of weights: scale * sum (with a minimum), -8 * sum, -16 * sum and -128 * sum
// (integers kept as bits), and the sums of the first sixteen values and of the others, 16 bits each. On AVX2 -16 * sum
// is a pair of 16-bit integers, of columns 4c and 4c + 1 and of columns 4c + 2 and 4c + 3: where the 16-bit sums of
// product_avx2.inl begin. With i8mm the values of two rows alternate, eight of each (product_i8mm.inl).
void quantise_row(const float* x, int64_t blocks, int r, const Tile& tile) {
  const int rows = tile.rows;
  const bool paired = KERNEL_ISA == ISA_NEON_I8MM && (r | 1) < rows;
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even, as the default mode does
  for (int64_t b = 0; b < blocks; ++b) {
    F low = load(x + 32 * b), high = load(x + 32 * b + 16);
    const I absolute = splat(int32_t(0x7fffffff));
    // as integers, magnitudes are ordered, with NaN above infinity
    I top = maximum(bits(low) & absolute, bits(high) & absolute);
    const int32_t most = largest(top);
    float magnitude;
    std::memcpy(&magnitude, &most, 4);
    const bool finite = most < 0x7f800000, usable = finite && magnitude >= 1e-30f;
    const float inverse = usable ? 127.0f / magnitude : 0.0f;
    float scale = usable ? magnitude / 127.0f : 0.0f;
    if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
    int8_t apart[32], *to = paired ? apart : tile.values + (b * rows + r) * 32;
    Sums sums{0, 0, 0};
    if (usable) {
      const I first = bits(low * splat(inverse) + magic) - bits(magic);
      const I second = bits(high * splat(inverse) + magic) - bits(magic);
      sums = store_values(to, first, second);
    } else {
      std::memset(to, 0, 32);
    }
    if (paired) {
      int8_t* pair = tile.values + (b * rows + r / 2 * 2) * 32;
      for (int i = 0; i < 4; ++i) std::memcpy(pair + 16 * i + 8 * (r % 2), apart + 8 * i, 8);
    }
    tile.scale[b * rows + r] = scale;
    tile.term[kMinimum][b * rows + r] = scale * float(sums.total);
    const auto put = [&](Kind kind, int32_t value) INLINE_LAMBDA {
      std::memcpy(tile.term[kind] + b * rows + r, &value, 4);
    };
    put(kBy8, -8 * sums.total);
    put(kBy16, sums.by16);
    put(kBy128, -128 * sums.total);
    put(kHalves, sums.halves);
  }
}
