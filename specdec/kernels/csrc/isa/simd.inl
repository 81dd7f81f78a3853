// Sixteen floats and what can be done with them, for one instruction set. all.inl includes this file, then
// quantise.inl, product.inl, rows.inl and attention.inl, once per set, inside a namespace and under the compiler's
// target pragma, with KERNEL_ISA = 0 (portable), 2 (AVX2) or 5 (AVX-512 VNNI). They therefore have no include guards
// and include no library: dispatch.h has what they need.
//
// Every set gives the same bits: floats are combined in an order that does not depend on the vector width (16
// lanes everywhere, in as many registers as that takes), no multiply-add is fused, and integer sums are exact.

#if KERNEL_ISA == 5
constexpr int kLanes = 16;
#elif KERNEL_ISA == 2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
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
  EACH a.p[e] = a.p[e] < low.p[e] ? low.p[e] : a.p[e];
  EACH a.p[e] = a.p[e] > high.p[e] ? high.p[e] : a.p[e];
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

// Halving tree: lane i adds lane i + 8, then + 4, + 2, + 1.
INLINE float sum(F v) {
#if KERNEL_ISA == 5
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v.p[0]),
                           _mm512_extractf32x8_ps((__m512)v.p[0], 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#elif KERNEL_ISA == 2
  __m256 a = (__m256)(v.p[0] + v.p[1]);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
#endif
#if KERNEL_ISA
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
#else
  VF a = (v.p[0] + v.p[2]) + (v.p[1] + v.p[3]);
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}

#if KERNEL_ISA == 5
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
#elif KERNEL_ISA == 2
// The rest of sum() for eight vectors at once, whose lanes i and i + 8 are added already.
INLINE VF sums(const VF (&v)[8]) {
  __m256 a[4], b[2];
  const auto at = [&](int i) INLINE_LAMBDA { return (__m256)v[i]; };
  for (int i = 0; i < 4; ++i)
    a[i] = _mm256_permute2f128_ps(at(i), at(i + 4), 0x20) + _mm256_permute2f128_ps(at(i), at(i + 4), 0x31);
  for (int i = 0; i < 2; ++i) b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44) + _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
  const __m256 c = _mm256_shuffle_ps(b[0], b[1], 0x88) + _mm256_shuffle_ps(b[0], b[1], 0xdd);
  return (VF)_mm256_permute_ps(c, 0xd8);  // each half held its vectors as 0, 2, 1, 3
}
#endif

INLINE int32_t sum(I v) {
#if KERNEL_ISA == 5
  return _mm512_reduce_add_epi32((__m512i)v.p[0]);
#else
  int32_t total = 0;
  EACH for (int i = 0; i < kLanes; ++i) total += v.p[e][i];
  return total;
#endif
}

INLINE int32_t largest(I v) {
#if KERNEL_ISA == 5
  return _mm512_reduce_max_epi32((__m512i)v.p[0]);
#elif KERNEL_ISA == 2
  const __m256i a = _mm256_max_epi32((__m256i)v.p[0], (__m256i)v.p[1]);
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
#else
  int32_t most = v.p[0][0];
  EACH for (int i = 0; i < kLanes; ++i) most = v.p[e][i] > most ? v.p[e][i] : most;
  return most;
#endif
}

INLINE F half_to_float(const uint16_t* x) {
#if KERNEL_ISA == 5
  return F{{(VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))}};
#elif KERNEL_ISA == 2
  return F{{(VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)),
            (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + 8)))}};
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
