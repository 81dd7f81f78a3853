// Sixteen floats and what can be done with them, for one instruction set. all.inl includes this file, then
// quantise.inl, product.inl, rows.inl, store.inl and attention.inl, once per set, inside a namespace and under the
// compiler's target pragma, with KERNEL_ISA set. They therefore have no include guards and include no library:
// dispatch.h has what they need.
//
// Every set gives the same bits: floats are combined in an order that does not depend on the vector width (16
// lanes everywhere, in as many registers as that takes), no multiply-add is fused, and integer sums are exact.

#if KERNEL_ISA == ISA_AVX512
#define KERNEL_LANES 16
#elif KERNEL_ISA == ISA_AVX2 || KERNEL_ISA == ISA_AVX_VNNI
#define KERNEL_LANES 8
#else
#define KERNEL_LANES 4
#endif
constexpr int kLanes = KERNEL_LANES;
constexpr int kParts = 16 / kLanes;

typedef float VF __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Sixteen floats, and sixteen integers.
struct F {
  VF p[kParts];
};
struct I {
  VI p[kParts];
};

#define EACH for (int e = 0; e < kParts; ++e)
INLINE F splat(float x) { F r; EACH r.p[e] = x - VF{}; return r; }
INLINE I splat(int32_t x) { I r; EACH r.p[e] = x + VI{}; return r; }
INLINE F load(const float* x) { F r; EACH r.p[e] = *reinterpret_cast<const VF*>(x + e * kLanes); return r; }
INLINE I load(const int32_t* x) { I r; EACH r.p[e] = *reinterpret_cast<const VI*>(x + e * kLanes); return r; }
INLINE void store(float* x, F v) { EACH *reinterpret_cast<VF*>(x + e * kLanes) = v.p[e]; }
INLINE F operator+(F a, F b) { EACH a.p[e] += b.p[e]; return a; }
INLINE F operator-(F a, F b) { EACH a.p[e] -= b.p[e]; return a; }
INLINE F operator*(F a, F b) { EACH a.p[e] *= b.p[e]; return a; }
INLINE F operator/(F a, F b) { EACH a.p[e] /= b.p[e]; return a; }
INLINE I operator+(I a, I b) { EACH a.p[e] += b.p[e]; return a; }
INLINE I operator-(I a, I b) { EACH a.p[e] -= b.p[e]; return a; }
INLINE I operator&(I a, I b) { EACH a.p[e] &= b.p[e]; return a; }
INLINE I bits(F a) { I r; EACH r.p[e] = (VI)a.p[e]; return r; }
INLINE F floats(I a) { F r; EACH r.p[e] = (VF)a.p[e]; return r; }
INLINE F convert(I a) { F r; EACH r.p[e] = __builtin_convertvector(a.p[e], VF); return r; }
// b where either is NaN
INLINE F maximum(F a, F b) { EACH a.p[e] = a.p[e] > b.p[e] ? a.p[e] : b.p[e]; return a; }
// a where a is NaN
INLINE F clamp(F a, F low, F high) {
#if KERNEL_IS_NEON
  EACH a.p[e] = (VF)vminq_f32(vmaxq_f32((float32x4_t)a.p[e], (float32x4_t)low.p[e]), (float32x4_t)high.p[e]);
#else
  EACH a.p[e] = a.p[e] < low.p[e] ? low.p[e] : a.p[e];
  EACH a.p[e] = a.p[e] > high.p[e] ? high.p[e] : a.p[e];
#endif
  return a;
}
INLINE I maximum(I a, I b) { EACH a.p[e] = a.p[e] > b.p[e] ? a.p[e] : b.p[e]; return a; }

// The first n floats, zeros after them.
INLINE F load_part(const float* x, int n) {
  float whole[16] = {};
  std::memcpy(whole, x, sizeof(float) * n);
  return load(whole);
}
INLINE void store_part(float* x, F v, int n) {
  float whole[16];
  store(whole, v);
  std::memcpy(x, whole, sizeof(float) * n);
}

#if KERNEL_LANES < 16
// The first steps of sum(), until one register is left.
INLINE VF folded(F v) {
#if KERNEL_LANES == 8
  return v.p[0] + v.p[1];
#else
  return (v.p[0] + v.p[2]) + (v.p[1] + v.p[3]);
#endif
}
#endif

// Halving tree: lane i adds lane i + 8, then + 4, + 2, + 1.
INLINE float sum(F v) {
#if KERNEL_LANES >= 8
#if KERNEL_ISA == ISA_AVX512
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v.p[0]), _mm512_extractf32x8_ps((__m512)v.p[0], 1));
#else
  const __m256 a = (__m256)folded(v);
#endif
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
#elif KERNEL_IS_NEON
  const float32x4_t a = (float32x4_t)folded(v);
  return vpadds_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a)));
#else
  const VF a = folded(v);
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

#if KERNEL_ISA == ISA_AVX512
// sum() of sixteen vectors at once, with the same tree: each level adds the halves of two vectors in one register.
INLINE F sums(const F (&v)[16]) {
  __m512 a[8], b[4], c[2];
  const auto at = [&](int i) INLINE_LAMBDA { return (__m512)v[i].p[0]; };
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_shuffle_f32x4(at(i), at(i + 8), 0x44) + _mm512_shuffle_f32x4(at(i), at(i + 8), 0xee);
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88) + _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44) + _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
  const __m512 d = _mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd);
  // blocks now hold vectors 0.., 8.., 4.., 12.., and lanes within them 0, 2, 1, 3
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return F{{(VF)_mm512_permutexvar_ps(order, d)}};
}
#elif KERNEL_LANES == 8
// sum() of eight vectors at once, which are folded already.
INLINE VF sums(const VF (&v)[8]) {
  __m256 a[4], b[2];
  const auto at = [&](int i) INLINE_LAMBDA { return (__m256)v[i]; };
  for (int i = 0; i < 4; ++i)
    a[i] = _mm256_permute2f128_ps(at(i), at(i + 4), 0x20) + _mm256_permute2f128_ps(at(i), at(i + 4), 0x31);
  for (int i = 0; i < 2; ++i) b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44) + _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
  const __m256 c = _mm256_shuffle_ps(b[0], b[1], 0x88) + _mm256_shuffle_ps(b[0], b[1], 0xdd);
  return (VF)_mm256_permute_ps(c, 0xd8);  // each half held its vectors as 0, 2, 1, 3
}
#elif KERNEL_IS_NEON
// The same of four.
INLINE VF sums(const VF (&v)[4]) {
  const auto halved = [&](int i) INLINE_LAMBDA {
    const float64x2_t a = (float64x2_t)v[i], b = (float64x2_t)v[i + 1];
    return vaddq_f32((float32x4_t)vzip1q_f64(a, b), (float32x4_t)vzip2q_f64(a, b));
  };
  return (VF)vpaddq_f32(halved(0), halved(2));
}
#endif

INLINE int32_t sum(I v) {
#if KERNEL_ISA == ISA_AVX512
  return _mm512_reduce_add_epi32((__m512i)v.p[0]);
#elif KERNEL_IS_NEON
  return vaddvq_s32((int32x4_t)((v.p[0] + v.p[1]) + (v.p[2] + v.p[3])));
#else
  int32_t total = 0;
  EACH for (int i = 0; i < kLanes; ++i) total += v.p[e][i];
  return total;
#endif
}

INLINE int32_t largest(I v) {
#if KERNEL_ISA == ISA_AVX512
  return _mm512_reduce_max_epi32((__m512i)v.p[0]);
#elif KERNEL_LANES == 8
  const __m256i a = _mm256_max_epi32((__m256i)v.p[0], (__m256i)v.p[1]);
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
#elif KERNEL_IS_NEON
  for (int e = 1; e < 4; ++e) v.p[0] = v.p[e] > v.p[0] ? v.p[e] : v.p[0];
  return vmaxvq_s32((int32x4_t)v.p[0]);
#else
  int32_t most = v.p[0][0];
  EACH for (int i = 0; i < kLanes; ++i) most = v.p[e][i] > most ? v.p[e][i] : most;
  return most;
#endif
}

// The low bytes of sixteen integers.
INLINE void store_bytes(int8_t* to, I v) {
#if KERNEL_ISA == ISA_AVX512
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v.p[0]));
#elif KERNEL_IS_NEON
  const auto narrow = [&](int e) INLINE_LAMBDA {
    return vcombine_s16(vmovn_s32((int32x4_t)v.p[e]), vmovn_s32((int32x4_t)v.p[e + 1]));
  };
  vst1q_s8(to, vcombine_s8(vmovn_s16(narrow(0)), vmovn_s16(narrow(2))));
#else
  EACH for (int i = 0; i < kLanes; ++i) to[e * kLanes + i] = int8_t(v.p[e][i]);
#endif
}

INLINE F half_to_float(const uint16_t* x) {
#if KERNEL_ISA == ISA_AVX512
  return F{{(VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))}};
#elif KERNEL_LANES == 8
  return F{{(VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)),
            (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + 8)))}};
#elif KERNEL_IS_NEON
  F r;
  EACH r.p[e] = (VF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * e)));
  return r;
#else
  float whole[16];
  for (int i = 0; i < 16; ++i) whole[i] = half_value(x[i]);
  return load(whole);
#endif
}

// e^x within 2 units in the last place; below -87.3 the smallest normal number, above 88.3 the largest power.
// Cody-Waite reduction to |r| <= ln2 / 2, then the Taylor polynomial of degree 7.
INLINE F exponential(F x) {
  x = clamp(x, splat(-87.3f), splat(88.3f));
  const F magic = splat(12582912.0f);
  const F shifted = x * splat(1.44269504f) + magic;
  const F n = shifted - magic;
  const F r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  F y = splat(1.0f / 5040);
  y = y * r + splat(1.0f / 720);
  y = y * r + splat(1.0f / 120);
  y = y * r + splat(1.0f / 24);
  y = y * r + splat(1.0f / 6);
  y = y * r + splat(0.5f);
  y = y * (r * r) + (r + splat(1.0f));
  I power = bits(shifted) - bits(magic) + splat(int32_t(127));
  EACH power.p[e] <<= 23;
  return y * floats(power);  // a product, so that NaN stays NaN
}
