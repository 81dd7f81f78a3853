// What happens to rows between the products, for one instruction set (see simd.h): attention over cache slots,
// norm, rotary embedding, gated activation. All float32.

// Scores of one query head against `count` keys: lanes multiply and add along D, then the halving tree.
INLINE void scores_of(const float* q, const Store& keys, int64_t first, int64_t count, float scale, float* to) {
  const int64_t whole = keys.width & ~int64_t(15);
  const int rest = int(keys.width - whole);
  const F q_rest = rest ? load_part(q + whole, rest) : splat(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const float* k = keys.data + (first + j) * keys.stride;
    F total = splat(0.0f);
    for (int64_t d = 0; d < whole; d += 16) total = total + load(q + d) * load(k + d);
    if (rest) total = total + q_rest * load_part(k + whole, rest);
    to[j] = sum(total) * scale;
  }
}

// Scores to weights in place: e^(score - largest). Returns 1 / sum, added in 16 lanes along the positions.
INLINE float soften(float* scores, int64_t count) {
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
  return 1.0f / sum(total);
}

// Sixteen-column pieces of sum_j weight_j * value_j, positions in order, over the (at most two) runs of slots.
template <int PIECES>
INLINE void mix(const float* weights, const Ring& ring, const Store& values, int64_t column, float over, float* to) {
  F total[PIECES];
  for (int c = 0; c < PIECES; ++c) total[c] = splat(0.0f);
  const float* weight = weights;
  for (int run = 0; run < 2; ++run) {
    const float* v = values.data + ring.start[run] * values.stride + column;
    for (int64_t j = 0; j < ring.count[run]; ++j, v += values.stride) {
      const F w = splat(*weight++);
      for (int c = 0; c < PIECES; ++c) total[c] = total[c] + w * load(v + 16 * c);
    }
  }
  for (int c = 0; c < PIECES; ++c) store(to + 16 * c, total[c] * splat(over));
}

INLINE void mix_part(const float* weights, const Ring& ring, const Store& values, int64_t column, float over,
                     float* to) {
  const int count = int(values.width - column);
  F total = splat(0.0f);
  const float* weight = weights;
  for (int run = 0; run < 2; ++run) {
    const float* v = values.data + ring.start[run] * values.stride + column;
    for (int64_t j = 0; j < ring.count[run]; ++j, v += values.stride)
      total = total + splat(*weight++) * load_part(v, count);
  }
  store_part(to, total * splat(over), count);
}

// `heads` query heads of one row against one key head. `scratch` holds heads * (number of positions) floats.
void attend(const float* q, const Store& keys, const Store& values, const Ring& ring, int64_t heads, float scale,
            float* to, float* scratch) {
  const int64_t value_width = values.width;
  const int64_t length = ring.count[0] + ring.count[1];
  if (length == 0) {
    std::memset(to, 0, sizeof(float) * heads * value_width);
    return;
  }
  constexpr int64_t kKeys = 32;  // keys that stay in the first-level cache while every head reads them
  float* at = scratch;
  for (int run = 0; run < 2; ++run)
    for (int64_t j = 0; j < ring.count[run]; j += kKeys) {
      const int64_t count = ring.count[run] - j < kKeys ? ring.count[run] - j : kKeys;
      for (int64_t h = 0; h < heads; ++h)
        scores_of(q + h * keys.width, keys, ring.start[run] + j, count, scale, at + h * length);
      at += count;
    }
  for (int64_t h = 0; h < heads; ++h) {
    float* weights = scratch + h * length;
    float* out = to + h * value_width;
    const float over = soften(weights, length);
    int64_t d = 0;
    for (; d + 64 <= value_width; d += 64) mix<4>(weights, ring, values, d, over, out + d);
    for (; d + 16 <= value_width; d += 16) mix<1>(weights, ring, values, d, over, out + d);
    if (d < value_width) mix_part(weights, ring, values, d, over, out + d);
  }
}

// One row of D floats; `scratch` holds D floats. The sum of squares is reference.py's halving tree.
void norm(const float* x, const float* weight, int64_t width, float eps, float* y, float* scratch) {
  int64_t half = 1;
  while (half < width) half *= 2;
  half /= 2;  // the padded width's half; what lies beyond `width` is zero and adds nothing
  float square;
  if (width <= 16) {
    const F v = load_part(x, int(width));
    square = sum(v * v);
  } else {
    int64_t i = 0;
    for (; i < width - half; ++i) scratch[i] = x[i] * x[i] + x[i + half] * x[i + half];
    for (; i < half; ++i) scratch[i] = x[i] * x[i];
    while (half > 16) {
      half /= 2;
      for (i = 0; i < half; ++i) scratch[i] += scratch[i + half];
    }
    square = sum(load(scratch));
  }
  const float over = 1.0f / __builtin_sqrtf(square / float(width) + eps);
  if (weight) {
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * over * weight[i];
  } else {
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * over;
  }
}

// One row of H heads of D floats, turned by one position's cos and sin.
void turn(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width, float* y) {
  const int64_t half = width / 2;
  for (int64_t h = 0; h < heads; ++h, x += width, y += width) {
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + -x[i + half] * sin[i];
    for (int64_t i = half; i < width; ++i) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
  }
}

// act(gate) * up; both activations are gate / (1 + e^-z), with z = gate for silu.
INLINE F gate_of(F gate, F up, bool gelu) {
  F z = gate;
  if (gelu) z = splat(1.59576912f) * (gate + splat(0.044715f) * (gate * gate * gate));  // 2 sqrt(2 / pi)
  return gate / (splat(1.0f) + exponential(splat(0.0f) - z)) * up;
}

void gate_row(const float* gate, const float* up, int64_t width, bool gelu, float* y) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) store(y + i, gate_of(load(gate + i), load(up + i), gelu));
  const int rest = int(width - i);
  if (rest) store_part(y + i, gate_of(load_part(gate + i, rest), load_part(up + i, rest), gelu), rest);
}
