// Keys and values of cache slots as float32 rows, for one instruction set (see simd.inl).
//
// A store may hold float32, bfloat16 or int8 with a scale per head and position, or values alone, from which keys are
// rebuilt (K = rope(V * weight): Gemma 4's full layers). What is not float32 is expanded a tile at a time and shared by
// all queries of attention.inl; the arithmetic after that is the same.

// Slots of consecutive positions that do not cross the ring's end, as float32 rows. `stored`: they lie in the store
// itself, which is mostly out of the cache, and not in a buffer.
struct Rows {
  const float* data;
  int64_t stride;
  bool stored;
  Rows from(int64_t row) const { return {data + row * stride, stride, stored}; }
};

INLINE F widen(const float* x) { return load(x); }

INLINE F widen(const uint16_t* x) {
#if KERNEL_ISA == ISA_AVX512
  return F{{(VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16)}};
#elif KERNEL_LANES == 8
  F r;
  EACH r.p[e] = (VF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(x + 8 * e))), 16);
  return r;
#elif KERNEL_IS_NEON
  F r;
  EACH r.p[e] = (VF)vshll_n_u16(vld1_u16(x + 4 * e), 16);
  return r;
#else
  uint32_t whole[16];
  for (int i = 0; i < 16; ++i) whole[i] = uint32_t(x[i]) << 16;
  return load(reinterpret_cast<const float*>(whole));
#endif
}

INLINE F widen(const int8_t* x) {
#if KERNEL_ISA == ISA_AVX512
  return F{{(VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)))}};
#elif KERNEL_LANES == 8
  F r;
  EACH r.p[e] = (VF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(x + 8 * e))));
  return r;
#elif KERNEL_IS_NEON
  const int8x16_t bytes = vld1q_s8(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return convert(I{{(VI)vmovl_s16(vget_low_s16(low)), (VI)vmovl_s16(vget_high_s16(low)),
                    (VI)vmovl_s16(vget_low_s16(high)), (VI)vmovl_s16(vget_high_s16(high))}});
#else
  float whole[16];
  for (int i = 0; i < 16; ++i) whole[i] = float(x[i]);
  return load(whole);
#endif
}

INLINE float widened(float x) { return x; }
INLINE float widened(int8_t x) { return x; }
INLINE float widened(uint16_t x) {
  const uint32_t whole = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &whole, 4);
  return value;
}

// A slot's numbers x [width] as float32, times `scale` and then times `weight` [width], each where there is one.
template <class Number>
INLINE void expand_row(const Number* x, int64_t width, const float* scale, const float* weight, float* to) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    F v = widen(x + i);
    if (scale) v = v * splat(*scale);
    if (weight) v = v * load(weight + i);
    store(to + i, v);
  }
  for (; i < width; ++i) {
    float v = widened(x[i]);
    if (scale) v *= *scale;
    if (weight) v *= weight[i];
    to[i] = v;
  }
}

// Asks memory for columns `column` .. `column + width` of `count` slots, before they are read.
INLINE void ask_for(const Plane& plane, int type, int64_t head, int64_t slot, int64_t count, int64_t column,
                    int64_t width) {
  const int64_t size = type == kInt8 ? 1 : type == kBfloat16 ? 2 : 4;
  const char* x = static_cast<const char*>(plane.data) + (head * plane.head + slot * plane.slot + column) * size;
  for (int64_t j = 0; j < count; ++j, x += plane.slot * size)
    for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(x + i);
}

// Columns `column` .. `column + width` of `count` slots from `slot` on, head `head`, times `weight` [width] where there
// is one; expanded into `buffer` [count, width] where the store has other numbers.
INLINE Rows expand(const Plane& plane, int type, int64_t head, int64_t slot, int64_t count, int64_t column,
                   int64_t width, int64_t slots, const float* weight, float* buffer) {
  const int64_t at = head * plane.head + slot * plane.slot + column;
  const auto expanded = [&](const auto* data, const float* scale) INLINE_LAMBDA {
    for (int64_t j = 0; j < count; ++j)
      expand_row(data + at + j * plane.slot, width, scale ? scale + j : nullptr, weight, buffer + j * width);
    return Rows{buffer, width, false};
  };
  if (type == kInt8) return expanded(static_cast<const int8_t*>(plane.data), plane.scale + head * slots + slot);
  if (type == kBfloat16) return expanded(static_cast<const uint16_t*>(plane.data), nullptr);
  const float* data = static_cast<const float*>(plane.data);
  if (weight) return expanded(data, nullptr);
  return Rows{data + at, plane.slot, true};
}

// Keys of positions position .. position + count - 1, which lie in consecutive slots.
INLINE Rows keys_of(const Attention& a, int64_t kv, int64_t position, int64_t count, float* buffer) {
  const KV& s = *a.store;
  const int64_t slot = position % s.slots;
  if (s.keys.data) return expand(s.keys, s.type, kv, slot, count, 0, s.width, s.slots, nullptr, buffer);
  expand(s.values, s.type, kv, slot, count, 0, s.width, s.slots, s.weight, buffer);
  for (int64_t j = 0; j < count; ++j) {
    const float *cos = s.cos + (position + j) * s.pairs, *sin = s.sin + (position + j) * s.pairs;
    float *low = buffer + j * s.width, *high = low + s.width / 2;
    for (int64_t i = 0; i < s.pairs; ++i) {
      const float before = low[i], after = high[i];
      low[i] = before * cos[i] - after * sin[i];
      high[i] = after * cos[i] + before * sin[i];
    }
  }
  return Rows{buffer, s.width, false};
}

