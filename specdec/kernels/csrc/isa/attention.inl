// Attention over cache slots, for one instruction set (see simd.inl), in three parts that steps.h hands out to
// threads: scores of a range of positions, softmax of a row, and the weighted sum of a range of columns. Each value
// is computed in one order (positions ascending, 16 lanes along the width, then the halving tree) however the work
// is cut, so bits depend on neither threads nor rows.
//
// A query is one head of one row. Up to kQueries of those that share a key head are computed at a time: without fused
// multiply-add, loads are what runs out first, and a key or value that is loaded serves all of them. With vectors of
// eight floats, registers hold the sums of three queries and two keys, or of three queries and two pieces of values.

// Queries that share a key head: where each has its row of a [rows, heads] array, and the positions of a tile that it
// sees, low .. high - 1.
constexpr int kQueries = KERNEL_LANES == 8 ? 3 : 4;
struct Queries {
  int64_t at[4], low[4], high[4];  // four, because the switches below name four on every set
};

// How many queries of a key head are computed at a time, so that all groups are about as large.
INLINE int group_size(const Attention& a) {
  const int64_t all = a.rows * (a.heads / a.kv_heads), groups = (all + kQueries - 1) / kQueries;
  return int((all + groups - 1) / groups);
}

// body(queries, count) for all queries of key head `kv` that see any of positions from .. to - 1, `size` at a time.
template <class Body>
INLINE void each_group(const Attention& a, int64_t kv, int size, int64_t from, int64_t to, const Body& body) {
  const int64_t group = a.heads / a.kv_heads;
  Queries some;
  int count = 0;
  for (int64_t t = 0; t < a.rows; ++t) {
    const int64_t low = larger(a.first[t], from), high = smaller(a.end[t], to);
    if (low >= high) continue;
    for (int64_t at = t * a.heads + kv * group, end = at + group; at < end; ++at) {
      some.at[count] = at;
      some.low[count] = low;
      some.high[count] = high;
      if (++count < size) continue;
      body(some, count);
      count = 0;
    }
  }
  if (count) body(some, count);
}

// Scores of N queries against `count` keys; STORED: `keys.stored`.
template <int N, bool STORED>
INLINE void scores_of(const float* const (&q)[N], const Rows& keys, int64_t count, int64_t width, float scale,
                      float* const (&to)[N]) {
  const int64_t whole = width & ~int64_t(15);
  const int rest = int(width - whole);
  const auto dot = [&](int h, int64_t j) INLINE_LAMBDA {
    const float *a = q[h], *b = keys.data + j * keys.stride;
    F total = splat(0.0f);
    for (int64_t d = 0; d < whole; d += 16) total = total + load(a + d) * load(b + d);
    if (rest) total = total + load_part(a + whole, rest) * load_part(b + whole, rest);
    return total;
  };
  int64_t j = 0;
#if KERNEL_ISA == ISA_AVX512
  constexpr int kKeys = 16 / N;
  for (; !rest && j + kKeys <= count; j += kKeys) {
    F total[16];
    for (int i = 0; i < 16; ++i) total[i] = splat(0.0f);
    const float* key = keys.data + j * keys.stride;
    for (int64_t d = 0; d < whole; d += 16) {
      F query[N];
      for (int h = 0; h < N; ++h) query[h] = load(q[h] + d);
      for (int i = 0; i < kKeys; ++i) {
        const F k = load(key + i * keys.stride + d);
        if (STORED) __builtin_prefetch(key + (i + kKeys) * keys.stride + d);
        for (int h = 0; h < N; ++h) total[h * kKeys + i] = total[h * kKeys + i] + query[h] * k;
      }
    }
    float found[16];
    store(found, sums(total) * splat(scale));
    for (int h = 0; h < N; ++h) std::memcpy(to[h] + j, found + h * kKeys, sizeof(float) * kKeys);
  }
#elif KERNEL_LANES == 8
  for (; !rest && j + kLanes <= count; j += kLanes) {
    VF folds[N][kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      F total[N][2];
      for (int h = 0; h < N; ++h) total[h][0] = total[h][1] = splat(0.0f);
      const float *key = keys.data + (j + i) * keys.stride, *other = key + keys.stride;
      for (int64_t d = 0; d < whole; d += 16) {
        if (STORED) __builtin_prefetch(key + kLanes * keys.stride + d);
        if (STORED) __builtin_prefetch(other + kLanes * keys.stride + d);
        EACH {  // and not sixteen at a time, for which registers would run out
          const VF a = load(key + d).p[e], b = load(other + d).p[e];
          for (int h = 0; h < N; ++h) {
            const VF query = load(q[h] + d).p[e];
            total[h][0].p[e] += query * a;
            total[h][1].p[e] += query * b;
          }
        }
      }
      for (int h = 0; h < N; ++h) folds[h][i] = folded(total[h][0]), folds[h][i + 1] = folded(total[h][1]);
    }
    for (int h = 0; h < N; ++h) *reinterpret_cast<VF*>(to[h] + j) = sums(folds[h]) * splat(scale).p[0];
  }
#elif KERNEL_ISA != ISA_PORTABLE
  for (; !rest && j + kLanes <= count; j += kLanes) {
    VF folds[N][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      F total[N];
      for (int h = 0; h < N; ++h) total[h] = splat(0.0f);
      const float* key = keys.data + (j + i) * keys.stride;
      for (int64_t d = 0; d < whole; d += 16) {
        const F k = load(key + d);
        if (STORED) __builtin_prefetch(key + kLanes * keys.stride + d);
        for (int h = 0; h < N; ++h) total[h] = total[h] + load(q[h] + d) * k;
      }
      for (int h = 0; h < N; ++h) folds[h][i] = folded(total[h]);
    }
    for (int h = 0; h < N; ++h) *reinterpret_cast<VF*>(to[h] + j) = sums(folds[h]) * splat(scale).p[0];
  }
#endif
  for (; j < count; ++j)
    for (int h = 0; h < N; ++h) to[h][j] = sum(dot(h, j)) * scale;
}

// Scores of `some` queries, the first N, against the keys of positions from ..: all that any of them sees. What a query
// does not see is never read.
template <int N>
void score_group(const Attention& a, const Queries& some, int64_t from, const Rows& keys) {
  const int64_t width = a.store->width;
  int64_t low = some.low[0], high = some.high[0];
  for (int i = 1; i < N; ++i) low = smaller(low, some.low[i]), high = larger(high, some.high[i]);
  const float* q[N];
  float* to[N];
  for (int i = 0; i < N; ++i) {
    q[i] = a.q + some.at[i] * width;
    to[i] = a.scores + some.at[i] * a.span + low - a.low;
  }
  const Rows seen = keys.from(low - from);
  if (keys.stored) {
    scores_of<N, true>(q, seen, high - low, width, a.scale, to);
  } else {
    scores_of<N, false>(q, seen, high - low, width, a.scale, to);
  }
}

// Scores of the queries that share key head `kv`, against positions from .. to - 1. `buffer`: kPositions * width floats.
void score(const Attention& a, int64_t kv, int64_t from, int64_t to, float* buffer) {
  const KV& s = *a.store;
  const int size = group_size(a);
  while (from < to) {
    const int64_t count = smaller(smaller(to - from, s.slots - from % s.slots), kPositions);
    const Rows keys = keys_of(a, kv, from, count, buffer);
    each_group(a, kv, size, from, from + count, [&](const Queries& some, int queries) INLINE_LAMBDA {
      switch (queries) {
        case 4: return score_group<4>(a, some, from, keys);
        case 3: return score_group<3>(a, some, from, keys);
        case 2: return score_group<2>(a, some, from, keys);
        default: return score_group<1>(a, some, from, keys);
      }
    });
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

// N queries: y += sum over `count` positions of weight * value, for PIECES * 16 columns from `column` on. STORED:
// `values.stored`; what lies `next` rows further on is then asked for, because it is read later.
template <int N, int PIECES, bool STORED>
INLINE void add_weighted_values(const float* const (&weights)[N], const Rows& values, int64_t count,
                                float* const (&y)[N], int64_t column, int64_t next) {
  F total[N][PIECES];
  for (int h = 0; h < N; ++h)
    for (int c = 0; c < PIECES; ++c) total[h][c] = load(y[h] + column + 16 * c);
  const float* value = values.data + column;
  for (int64_t j = 0; j < count; ++j, value += values.stride) {
    F v[PIECES];
    for (int c = 0; STORED && c < PIECES; ++c) __builtin_prefetch(value + next * values.stride + 16 * c);
    for (int c = 0; c < PIECES; ++c) v[c] = load(value + 16 * c);
    for (int h = 0; h < N; ++h) {
      const F w = splat(weights[h][j]);
      for (int c = 0; c < PIECES; ++c) total[h][c] = total[h][c] + w * v[c];
    }
  }
  for (int h = 0; h < N; ++h)
    for (int c = 0; c < PIECES; ++c) store(y[h] + column + 16 * c, total[h][c]);
}

// The columns column .. column + width - 1 of the values of positions from .. on; `next`: as above.
struct ValueTile {
  Rows values;
  int64_t from, column, width, next;
};
constexpr int64_t kSlotsAhead = 32;  // `next`, at the most

// The same for a tile's columns, of N queries from the first of `some` on, and for positions low .. high - 1.
template <int N>
INLINE void add_weighted_columns(const Attention& a, const Queries& some, int first, int64_t low, int64_t high,
                                 const ValueTile& tile) {
  if (low >= high) return;
  const float* weights[N];
  float* y[N];
  for (int i = 0; i < N; ++i) {
    weights[i] = a.scores + some.at[first + i] * a.span + low - a.low;
    y[i] = a.y + some.at[first + i] * a.store->value_width + tile.column;
  }
  const Rows seen = tile.values.from(low - tile.from);
  const int64_t count = high - low, width = tile.width;
  // as many sums as registers are good for
  constexpr int kPieces = KERNEL_ISA == ISA_AVX512 || N <= (KERNEL_LANES == 8 ? 3 : 2) ? 2 : 1;
  int64_t c = 0;
  for (; seen.stored && c + 16 * kPieces <= width; c += 16 * kPieces)
    add_weighted_values<N, kPieces, true>(weights, seen, count, y, c, tile.next);
  for (; c + 16 * kPieces <= width; c += 16 * kPieces)
    add_weighted_values<N, kPieces, false>(weights, seen, count, y, c, 0);
  for (; c + 16 <= width; c += 16) add_weighted_values<N, 1, false>(weights, seen, count, y, c, 0);
  for (; c < width; ++c)
    for (int i = 0; i < N; ++i)
      for (int64_t j = 0; j < count; ++j) y[i][c] += weights[i][j] * seen.data[j * seen.stride + c];
}

// Together for the positions that all N queries see, and one by one for those before and after.
template <int N>
void weigh_group(const Attention& a, const Queries& some, const ValueTile& tile) {
  int64_t low = some.low[0], high = some.high[0];
  for (int i = 1; i < N; ++i) low = larger(low, some.low[i]), high = smaller(high, some.high[i]);
  high = larger(low, high);
  for (int i = 0; i < N; ++i) add_weighted_columns<1>(a, some, i, some.low[i], smaller(low, some.high[i]), tile);
  add_weighted_columns<N>(a, some, 0, low, high, tile);
  for (int i = 0; i < N; ++i) add_weighted_columns<1>(a, some, i, larger(high, some.low[i]), some.high[i], tile);
}

// Columns column .. column + width of the queries that share key head `kv`; width <= kColumns. `buffer`: kSpread
// floats.
void weighted_values(const Attention& a, int64_t kv, int64_t column, int64_t width, float* buffer) {
  const KV& s = *a.store;
  const int64_t group = a.heads / a.kv_heads, last = (kv + 1) * group;
  const int size = group_size(a);
  const int64_t groups = a.rows * group / size;
  const auto out = [&](int64_t t, int64_t h) INLINE_LAMBDA { return a.y + (t * a.heads + h) * s.value_width + column; };
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t h = kv * group; h < last; ++h) std::memset(out(t, h), 0, sizeof(float) * width);
  for (int64_t from = a.low; from < a.high;) {
    const int64_t slot = from % s.slots, left = smaller(a.high - from, s.slots - slot);
    const int64_t count = smaller(left, kSpread / width), next = smaller(left - count, count);
    const Rows values = expand(s.values, s.type, kv, slot, count, column, width, s.slots, nullptr, buffer);
    const ValueTile tile{values, from, column, width, smaller(next, kSlotsAhead)};
    // Before each group a share of what the next tile is expanded from: all at once is more than memory takes.
    const int64_t share = values.stored ? 0 : next / groups + 1;
    int64_t asked = 0;
    each_group(a, kv, size, from, from + count, [&](const Queries& some, int queries) INLINE_LAMBDA {
      const int64_t more = smaller(share, next - asked);
      ask_for(s.values, s.type, kv, slot + count + asked, more, column, width);
      asked += more;
      switch (queries) {
        case 4: return weigh_group<4>(a, some, tile);
        case 3: return weigh_group<3>(a, some, tile);
        case 2: return weigh_group<2>(a, some, tile);
        default: return weigh_group<1>(a, some, tile);
      }
    });
    from += count;
  }
  for (int64_t t = 0; t < a.rows; ++t)
    for (int64_t h = kv * group; h < last; ++h)
      if (a.end[t] > a.first[t]) scale_row(a.over[t * a.heads + h], width, out(t, h));
}
