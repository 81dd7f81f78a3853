// What happens to rows between the products, for one instruction set (see simd.inl): norm, rotary embedding, gated
// activation, sums. All float32.

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
void rope_row(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width, float* y) {
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

// y += x, and y *= factor.
void add_row(const float* x, int64_t width, float* y) {
  for (int64_t i = 0; i < width; ++i) y[i] += x[i];
}

void scale_row(float factor, int64_t width, float* y) {
  for (int64_t i = 0; i < width; ++i) y[i] *= factor;
}

// y = x / by.
void divide_row(const float* x, float by, int64_t width, float* y) {
  for (int64_t i = 0; i < width; ++i) y[i] = x[i] / by;
}

// Row `row` of packed weights as floats [K]: reference.py's block_rows.
template <int BITS>
INLINE void unpack_row_of(const Weights& w, int64_t row, float* y) {
  const int64_t group = row / 16;
  const int lane = int(row % 16), zero = w.minimum || w.table ? 0 : 1 << (BITS - 1);
  for (int64_t b = 0; b < w.blocks; ++b, y += 32) {
    const int64_t at = (group * w.blocks + b) * 16 + lane;
    const uint8_t* q = w.q + (group * w.blocks + b) * (64 * BITS);
    int values[32];
    for (int i = 0; i < 32; ++i) values[i] = code_at(q, BITS, i / 4, 4 * lane + i % 4) - zero;
    for (int i = 0; w.table && i < 32; ++i) values[i] = w.table[values[i]];
    const float d = half_value(w.scale[at]) * float(w.unit), m = w.minimum ? half_value(w.minimum[at]) : 0.0f;
    for (int half = 0; half < 2; ++half) {
      const int sub = w.sub ? w.sub[2 * at + half] : w.minimum ? 17 : 1;
      const int factor = w.minimum ? sub & 15 : int8_t(sub);
      const float low = m * float(sub >> 4);
      float* to = y + 16 * half;
      for (int i = 0; i < 16; ++i) to[i] = float(values[16 * half + i] * factor) * d;
      for (int i = 0; w.minimum && i < 16; ++i) to[i] += low;
    }
  }
}

void unpack_row(const Weights& w, int64_t row, float* y) {
  switch (w.bits) {
    case 2: return unpack_row_of<2>(w, row, y);
    case 3: return unpack_row_of<3>(w, row, y);
    case 4: return unpack_row_of<4>(w, row, y);
    case 5: return unpack_row_of<5>(w, row, y);
    case 6: return unpack_row_of<6>(w, row, y);
    default: return unpack_row_of<8>(w, row, y);
  }
}

// scale * (down x) for kRanks ranks of a low-rank part from `rank` on: low [kRanks], of a row x [width].
template <class T>
INLINE void descend_as(const LowRank& part, int64_t rank, int64_t width, const float* x, float* low) {
  const int64_t blocks = (width + 15) / 16;
  const T* down = static_cast<const T*>(part.down) + rank * 16 * blocks;
  F total[kRanks];
  for (F& one : total) one = splat(0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    __builtin_prefetch(reinterpret_cast<const char*>(down + b * (16 * kRanks)) + 1024);
    const F v = 16 * b + 16 <= width ? load(x + 16 * b) : load_part(x + 16 * b, int(width - 16 * b));
    for (int r = 0; r < kRanks; ++r) total[r] = total[r] + v * widen(down + b * (16 * kRanks) + 16 * r);
  }
  for (int r = 0; r < kRanks; ++r) low[r] = part.scale * sum(total[r]);
}

void descend(const LowRank& part, int64_t rank, int64_t width, const float* x, float* low) {
  return (part.wide ? descend_as<float> : descend_as<uint16_t>)(part, rank, width, x, low);
}

// y += up times low [rank], outputs 16 * group .. + count - 1.
template <class T>
INLINE void ascend_as(const LowRank& part, int64_t group, const float* low, int count, float* y) {
  const T* up = static_cast<const T*>(part.up) + group * 16 * part.rank;
  F total = splat(0.0f);
  for (int64_t r = 0; r < part.rank; ++r) total = total + splat(low[r]) * widen(up + 16 * r);
  if (count == 16) {
    store(y, load(y) + total);
  } else {
    store_part(y, load_part(y, count) + total, count);
  }
}

void ascend(const LowRank& part, int64_t group, const float* low, int count, float* y) {
  return (part.wide ? ascend_as<float> : ascend_as<uint16_t>)(part, group, low, count, y);
}

// The first of the largest of x [count], and its value; a NaN wins, wherever it is.
int64_t best_of(const float* x, int64_t count, float* value) {
  F top = splat(-std::numeric_limits<float>::infinity());
  I magnitude = splat(int32_t(0));
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F v = load(x + i);
    top = maximum(v, top);
    magnitude = maximum(bits(v) & splat(int32_t(0x7fffffff)), magnitude);  // above infinity's bits: NaN
  }
  float peak = -std::numeric_limits<float>::infinity();
  EACH for (int lane = 0; lane < kLanes; ++lane) peak = top.p[e][lane] > peak ? top.p[e][lane] : peak;
  bool nan = largest(magnitude) > 0x7f800000;
  for (; i < count; ++i) {
    peak = x[i] > peak ? x[i] : peak;
    nan = nan || x[i] != x[i];
  }
  int64_t found = 0;
  while (found < count - 1 && !(nan ? x[found] != x[found] : x[found] == peak)) ++found;
  *value = x[found];
  return found;
}

// SplitMix64's finaliser, as `_hash` of specdec/engine/sampling.py: the 53 bits of token `id` under `key`.
inline uint64_t noise_bits(uint64_t id, uint64_t key) {
  uint64_t v = id * 0x9E3779B97F4A7C15u + key;
  v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
  v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
  return (v ^ (v >> 31)) >> 11;
}

constexpr double kUnit = 1.0 / 9007199254740992.0;  // 2^-53
constexpr double kReach = 41.055;  // `_REACH` of specdec/engine/sampling.py: further below the top nobody wins

// Standard Gumbel noise from those bits.
inline double gumbel(uint64_t bits) { return -std::log(-std::log((double(bits) + 0.5) * kUnit)); }

constexpr int kPiece = 64;  // scores whose largest is looked at first: most pieces need no more

// The largest of kPiece scores.
INLINE float peak_of(const float* x) {
  F top = load(x);
  for (int i = 16; i < kPiece; i += 16) top = maximum(load(x + i), top);
  float lanes[16], peak = -std::numeric_limits<float>::infinity();
  store(lanes, top);
  for (float lane : lanes) peak = lane > peak ? lane : peak;
  return peak;
}

// The largest of each kPiece of x [count], the last of what is left: peaks [count / kPiece, rounded up].
void piece_peaks(const float* x, int64_t count, float* peaks) {
  for (; count >= kPiece; x += kPiece, count -= kPiece) *peaks++ = peak_of(x);
  if (!count) return;
  float peak = x[0];
  for (int64_t i = 1; i < count; ++i) peak = x[i] > peak ? x[i] : peak;
  *peaks = peak;
}

// At least the largest of kPiece tokens' 53 bits: of the upper 31, which every instruction set can compare.
INLINE uint64_t noise_bound(const uint64_t* bits) {
  int32_t upper[kPiece];
  for (int i = 0; i < kPiece; ++i) upper[i] = int32_t(bits[i] >> 22);
  I top = splat(int32_t(0));
  for (int i = 0; i < kPiece; i += 16) top = maximum(load(upper + i), top);
  return uint64_t(largest(top)) << 22 | ((1 << 22) - 1);
}

// Finds the tokens that can have the largest scores[i] + gumbel(u[i]), u[i] = (bits + 1/2) / 2^53: found [count] gets
// their indices, ascending; returns how many. `ids` [count]: whose noise; null: i's. `top`: the largest score; nothing
// at or below `floor` can win. A token that is `need` below the best sum of the likeliest ones must have
// gumbel(u) >= need, so 1 - u <= exp(-need): a look into a table instead of two logarithms. The caller computes the
// sums of those few as it always does, so no choice depends on this.
int64_t gumbel_candidates(const float* scores, const int64_t* ids, int64_t count, float top, double floor, uint64_t key,
                   int64_t* found) {
  constexpr int kSteps = 64, kExact = 256;
  double limit[kSteps], best = -std::numeric_limits<double>::infinity();
  for (int k = 0; k < kSteps; ++k) limit[k] = std::exp(double(-k)) * (1 + 1e-9);
  int exact = 0;
  for (int64_t at = 0; at < count && exact < kExact; at += kPiece) {
    const int64_t end = at + kPiece < count ? at + kPiece : count;
    if (end - at == kPiece && peak_of(scores + at) < top - 4.0f) continue;
    for (int64_t i = at; i < end && exact < kExact; ++i) {
      if (scores[i] < top - 4.0f || scores[i] <= floor) continue;
      const double sum = scores[i] + gumbel(noise_bits(uint64_t(ids ? ids[i] : i), key));
      best = sum > best ? sum : best;
      ++exact;
    }
  }
  best -= 1e-6;  // logarithms of other libraries round otherwise
  const auto can_win = [&](double score, uint64_t noise) INLINE_LAMBDA {
    const double need = best - score, left = 1 - (double(noise) + 0.5) * kUnit;
    const int step = need < 0 ? 0 : need < kSteps - 1 ? int(need) : kSteps - 1;
    return need < 0 || left <= limit[step];
  };
  int64_t kept = 0;
  for (int64_t at = 0; at < count; at += kPiece) {
    const int n = int(count - at < kPiece ? count - at : kPiece);
    const float peak = n == kPiece ? peak_of(scores + at) : top;  // of a shorter piece not computed: `top` passes
    if (peak <= floor) continue;
    uint64_t bits[kPiece];
    for (int i = 0; i < n; ++i) bits[i] = noise_bits(uint64_t(ids ? ids[at + i] : at + i), key);
    if (n == kPiece && !can_win(peak, noise_bound(bits))) continue;
    for (int i = 0; i < n; ++i)
      if (scores[at + i] > floor && can_win(scores[at + i], bits[i])) found[kept++] = at + i;
  }
  return kept;
}

// The share of the largest x [count], `top`, in the softmax of factor * x.
float top_share(const float* x, int64_t count, float factor, float top) {
  const F by = splat(factor), peak = splat(top);
  F total = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) total = total + exponential((load(x + i) - peak) * by);
  float lanes[16];
  for (int k = 0; k < 16; ++k) lanes[k] = i + k < count ? x[i + k] : -std::numeric_limits<float>::infinity();
  total = total + exponential((load(lanes) - peak) * by);  // e^-87 for what is not there
  return 1.0f / sum(total);
}

// The index of the largest scores[i] + noise; without a largest score (a NaN), best_of's. `found` [count] is scratch.
int64_t gumbel_argmax(const float* scores, const int64_t* ids, int64_t count, uint64_t key, int64_t* found) {
  float top = 0;
  int64_t winner = best_of(scores, count, &top);
  const int64_t kept = gumbel_candidates(scores, ids, count, top, double(top) - kReach, key, found);
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < kept; ++k) {
    const int64_t i = found[k];
    const double sum = scores[i] + gumbel(noise_bits(uint64_t(ids ? ids[i] : i), key));
    if (sum > best) best = sum, winner = i;
  }
  return winner;
}
