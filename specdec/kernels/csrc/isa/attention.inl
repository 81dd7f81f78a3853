// Attention over cache slots, for one instruction set (see simd.inl), in three parts that steps.h hands out to
// threads: scores of a range of positions, softmax of a row, and the weighted sum of a range of columns. Each value
// is computed in one order (positions ascending, 16 lanes along the width, then the halving tree) however the work
// is cut, so bits depend on neither threads nor rows.
//
// A store may hold float32, bfloat16 or int8 with a scale per head and position, or values alone, from which keys
// are rebuilt (K = rope(V * weight): Gemma 4's full layers). What is not float32 is expanded a tile at a time and
// shared by all rows and heads; the arithmetic after that is the same.

// Slots of consecutive positions that do not cross the ring's end, as float32 rows.
struct Rows {
  const float* data;
  int64_t stride;
};

INLINE F widen(const uint16_t* x) {
#if KERNEL_IS_NEON
  F r;
  EACH r.p[e] = (VF)vshll_n_u16(vld1_u16(x + 4 * e), 16);
  return r;
#else
  uint32_t whole[16];
  for (int i = 0; i < 16; ++i) whole[i] = uint32_t(x[i]) << 16;
  return load(reinterpret_cast<const float*>(whole));
#endif
}

INLINE F widen(const int8_t* x, float scale) {
#if KERNEL_ISA == ISA_AVX512
  return F{{(VF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)))}} * splat(scale);
#elif KERNEL_IS_NEON
  const int8x16_t bytes = vld1q_s8(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return convert(I{{(VI)vmovl_s16(vget_low_s16(low)), (VI)vmovl_s16(vget_high_s16(low)),
                    (VI)vmovl_s16(vget_low_s16(high)), (VI)vmovl_s16(vget_high_s16(high))}}) * splat(scale);
#else
  float whole[16];
  for (int i = 0; i < 16; ++i) whole[i] = float(x[i]);
  return load(whole) * splat(scale);
#endif
}

// Columns `column` .. `column + width` of `count` slots from `slot` on, head `head`; expanded into `buffer` [count,
// width] where the store is not float32.
INLINE Rows expand(const Plane& plane, int type, int64_t head, int64_t slot, int64_t count, int64_t column,
                   int64_t width, int64_t slots, float* buffer) {
  const int64_t at = head * plane.head + slot * plane.slot + column;
  if (type == kFloat32) return Rows{static_cast<const float*>(plane.data) + at, plane.slot};
  for (int64_t j = 0; j < count; ++j) {
    float* to = buffer + j * width;
    int64_t i = 0;
    if (type == kBfloat16) {
      const uint16_t* x = static_cast<const uint16_t*>(plane.data) + at + j * plane.slot;
      for (; i + 16 <= width; i += 16) store(to + i, widen(x + i));
      for (; i < width; ++i) {
        const uint32_t whole = uint32_t(x[i]) << 16;
        std::memcpy(to + i, &whole, 4);
      }
    } else {
      const int8_t* x = static_cast<const int8_t*>(plane.data) + at + j * plane.slot;
      const float scale = plane.scale[head * slots + slot + j];
      for (; i + 16 <= width; i += 16) store(to + i, widen(x + i, scale));
      for (; i < width; ++i) to[i] = float(x[i]) * scale;
    }
  }
  return Rows{buffer, width};
}

// Keys of positions position .. position + count - 1, which lie in consecutive slots.
INLINE Rows keys_of(const Attention& a, int64_t kv, int64_t position, int64_t count, float* buffer) {
  const KV& s = *a.store;
  const int64_t slot = position % s.slots;
  if (s.keys.data) return expand(s.keys, s.type, kv, slot, count, 0, s.width, s.slots, buffer);
  const Rows values = expand(s.values, s.type, kv, slot, count, 0, s.width, s.slots, buffer);
  const int64_t half = s.width / 2;
  for (int64_t j = 0; j < count; ++j) {
    const float *v = values.data + j * values.stride, *cos = s.cos + (position + j) * s.pairs,
                *sin = s.sin + (position + j) * s.pairs;
    float* key = buffer + j * s.width;
    for (int64_t i = 0; i < s.width; ++i) key[i] = v[i] * s.weight[i];
    for (int64_t i = 0; i < s.pairs; ++i) {
      const float low = key[i], high = key[i + half];
      key[i] = low * cos[i] - high * sin[i];
      key[i + half] = high * cos[i] + low * sin[i];
    }
  }
  return Rows{buffer, s.width};
}

// Scores of HEADS query heads (`q_stride` apart) against `count` keys, to `to` (`to_stride` apart). A key that is
// loaded serves every head: without fused multiply-add, loads are what runs out first.
template <int HEADS>
INLINE void scores_of(const float* q, int64_t q_stride, const Rows& keys, int64_t count, int64_t width, float scale,
                      float* to, int64_t to_stride) {
  const int64_t whole = width & ~int64_t(15);
  const int rest = int(width - whole);
  const auto dot = [&](int h, int64_t j) INLINE_LAMBDA {
    const float *a = q + h * q_stride, *b = keys.data + j * keys.stride;
    F total = splat(0.0f);
    for (int64_t d = 0; d < whole; d += 16) total = total + load(a + d) * load(b + d);
    if (rest) total = total + load_part(a + whole, rest) * load_part(b + whole, rest);
    return total;
  };
  int64_t j = 0;
#if KERNEL_ISA == ISA_AVX512
  constexpr int kKeys = 16 / HEADS;
  for (; !rest && j + kKeys <= count; j += kKeys) {
    F total[16];
    for (int i = 0; i < 16; ++i) total[i] = splat(0.0f);
    const float* key = keys.data + j * keys.stride;
    for (int64_t d = 0; d < whole; d += 16) {
      F query[HEADS];
      for (int h = 0; h < HEADS; ++h) query[h] = load(q + h * q_stride + d);
      for (int i = 0; i < kKeys; ++i) {
        const F k = load(key + i * keys.stride + d);
        __builtin_prefetch(key + (i + kKeys) * keys.stride + d);
        for (int h = 0; h < HEADS; ++h) total[h * kKeys + i] = total[h * kKeys + i] + query[h] * k;
      }
    }
    float found[16];
    store(found, sums(total) * splat(scale));
    for (int h = 0; h < HEADS; ++h) std::memcpy(to + h * to_stride + j, found + h * kKeys, sizeof(float) * kKeys);
  }
#elif KERNEL_ISA != ISA_PORTABLE
  constexpr int kKeys = kLanes;
  for (; !rest && j + kKeys <= count; j += kKeys) {
    VF folds[HEADS][kKeys];
    for (int i = 0; i < kKeys; ++i) {
      F total[HEADS];
      for (int h = 0; h < HEADS; ++h) total[h] = splat(0.0f);
      const float* key = keys.data + (j + i) * keys.stride;
      for (int64_t d = 0; d < whole; d += 16) {
        const F k = load(key + d);
        __builtin_prefetch(key + kKeys * keys.stride + d);
        for (int h = 0; h < HEADS; ++h) total[h] = total[h] + load(q + h * q_stride + d) * k;
      }
      for (int h = 0; h < HEADS; ++h) folds[h][i] = folded(total[h]);
    }
    for (int h = 0; h < HEADS; ++h)
      *reinterpret_cast<VF*>(to + h * to_stride + j) = sums(folds[h]) * splat(scale).p[0];
  }
#endif
  for (; j < count; ++j)
    for (int h = 0; h < HEADS; ++h) to[h * to_stride + j] = sum(dot(h, j)) * scale;
}

// Scores of all rows and of the query heads that share key head `kv`, against positions from .. to - 1. `buffer`:
// kPositions * width floats.
void score(const Attention& a, int64_t kv, int64_t from, int64_t to, float* buffer) {
  const KV& s = *a.store;
  const int64_t group = a.heads / a.kv_heads;
  while (from < to) {
    const int64_t left = s.slots - from % s.slots;
    int64_t count = to - from < left ? to - from : left;
    if (count > kPositions) count = kPositions;
    const Rows keys = keys_of(a, kv, from, count, buffer);
    for (int64_t t = 0; t < a.rows; ++t) {
      const int64_t low = a.first[t] > from ? a.first[t] : from;
      const int64_t high = a.end[t] < from + count ? a.end[t] : from + count;
      if (low >= high) continue;
      const Rows seen{keys.data + (low - from) * keys.stride, keys.stride};
      for (int64_t h = kv * group, last = h + group; h < last;) {
        const float* q = a.q + (t * a.heads + h) * s.width;
        float* y = a.scores + (t * a.heads + h) * a.span + low - a.low;
        if (last - h >= 4) {
          scores_of<4>(q, s.width, seen, high - low, s.width, a.scale, y, a.span);
          h += 4;
#if KERNEL_ISA != ISA_PORTABLE && KERNEL_ISA != ISA_AVX512
        } else if (last - h == 3) {
          scores_of<3>(q, s.width, seen, high - low, s.width, a.scale, y, a.span);
          h += 3;
#endif
        } else if (last - h >= 2) {
          scores_of<2>(q, s.width, seen, high - low, s.width, a.scale, y, a.span);
          h += 2;
        } else {
          scores_of<1>(q, s.width, seen, high - low, s.width, a.scale, y, a.span);
          h += 1;
        }
      }
    }
    from += count;
  }
}

// Scores to weights in place: e^(score - largest) / sum, where the sum is added in 16 lanes along the positions.
// `over` gets 1 / sum, by which the weighted sum is multiplied at its end.
void softmax_row(const Attention& a, int64_t t, int64_t head) {
  const int64_t count = a.end[t] - a.first[t];
  if (count <= 0) return;
  float* scores = a.scores + (t * a.heads + head) * a.span + a.first[t] - a.low;
  F top = splat(-std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) top = maximum(load(scores + j), top);
  float peak = -std::numeric_limits<float>::infinity();
  EACH for (int i = 0; i < kLanes; ++i) peak = top.p[e][i] > peak ? top.p[e][i] : peak;
  for (; j < count; ++j) peak = scores[j] > peak ? scores[j] : peak;
  F total = splat(0.0f);
  for (j = 0; j + 16 <= count; j += 16) {
    const F weight = exponential(load(scores + j) - splat(peak));
    store(scores + j, weight);
    total = total + weight;
  }
  if (j < count) {
    const int rest = int(count - j);
    store_part(scores + j, exponential(load_part(scores + j, rest) - splat(peak)), rest);
    total = total + load_part(scores + j, rest);
  }
  a.over[t * a.heads + head] = 1.0f / sum(total);
}

// HEADS query heads of one row: y += sum over `count` positions of weight * value, for PIECES * 16 columns.
template <int HEADS, int PIECES>
INLINE void add_weighted_values(const float* weights, int64_t weights_stride, const Rows& values, int64_t count,
                                float* y, int64_t y_stride) {
  F total[HEADS][PIECES];
  for (int h = 0; h < HEADS; ++h)
    for (int c = 0; c < PIECES; ++c) total[h][c] = load(y + h * y_stride + 16 * c);
  for (int64_t j = 0; j < count; ++j) {
    F v[PIECES];
    for (int c = 0; c < PIECES; ++c) __builtin_prefetch(values.data + (j + 16) * values.stride + 16 * c);
    for (int c = 0; c < PIECES; ++c) v[c] = load(values.data + j * values.stride + 16 * c);
    for (int h = 0; h < HEADS; ++h) {
      const F w = splat(weights[h * weights_stride + j]);
      for (int c = 0; c < PIECES; ++c) total[h][c] = total[h][c] + w * v[c];
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int c = 0; c < PIECES; ++c) store(y + h * y_stride + 16 * c, total[h][c]);
}

// The same for kColumns columns: all at a time where there are registers for the sums of so many heads.
template <int HEADS>
INLINE void add_weighted_columns(const float* weights, int64_t weights_stride, const Rows& values, int64_t count,
                                 float* y, int64_t y_stride) {
  constexpr int kPieces = KERNEL_ISA == ISA_AVX512 || HEADS <= 2 ? kColumns / 16 : 1;
  for (int64_t c = 0; c < kColumns; c += 16 * kPieces) {
    const Rows columns{values.data + c, values.stride};
    add_weighted_values<HEADS, kPieces>(weights, weights_stride, columns, count, y + c, y_stride);
  }
}

// Columns column .. column + width of all rows and of the query heads that share key head `kv`; width <= kColumns.
// `buffer`: kPositions * kColumns floats.
void weighted_values(const Attention& a, int64_t kv, int64_t column, int64_t width, float* buffer) {
  const KV& s = *a.store;
  const int64_t group = a.heads / a.kv_heads, last = (kv + 1) * group;
  const auto out = [&](int64_t t, int64_t h) INLINE_LAMBDA { return a.y + (t * a.heads + h) * s.value_width + column; };
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t h = kv * group; h < last; ++h) std::memset(out(t, h), 0, sizeof(float) * width);
  for (int64_t from = a.low; from < a.high;) {
    const int64_t left = s.slots - from % s.slots;
    int64_t count = a.high - from < left ? a.high - from : left;
    if (count > kPositions) count = kPositions;
    const Rows values = expand(s.values, s.type, kv, from % s.slots, count, column, width, s.slots, buffer);
    for (int64_t t = 0; t < a.rows; ++t) {
      const int64_t low = a.first[t] > from ? a.first[t] : from;
      const int64_t high = a.end[t] < from + count ? a.end[t] : from + count;
      if (low >= high) continue;
      const Rows seen{values.data + (low - from) * values.stride, values.stride};
      const int64_t stride = s.value_width;
      for (int64_t h = kv * group; h < last;) {
        const float* weights = a.scores + (t * a.heads + h) * a.span + low - a.low;
        float* y = out(t, h);
        // several heads at a time: one sum alone would wait for each of its own additions
        const int64_t heads = width == kColumns ? last - h : 0;
        if (heads >= 4) {
          add_weighted_columns<4>(weights, a.span, seen, high - low, y, stride);
          h += 4;
        } else if (heads == 3) {
          add_weighted_columns<3>(weights, a.span, seen, high - low, y, stride);
          h += 3;
        } else if (heads == 2) {
          add_weighted_columns<2>(weights, a.span, seen, high - low, y, stride);
          h += 2;
        } else if (heads == 1) {
          add_weighted_columns<1>(weights, a.span, seen, high - low, y, stride);
          h += 1;
        } else {
          int64_t c = 0;
          for (; c + 16 <= width; c += 16)
            add_weighted_values<1, 1>(weights, a.span, Rows{seen.data + c, seen.stride}, high - low, y + c, stride);
          for (; c < width; ++c)
            for (int64_t j = 0; j < high - low; ++j) y[c] += weights[j] * seen.data[j * seen.stride + c];
          h += 1;
        }
      }
    }
    from += count;
  }
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t h = kv * group; h < last; ++h)
      if (a.end[t] > a.first[t]) scale_row(a.over[t * a.heads + h], width, out(t, h));
}
