// The two steps that are worth sharing between threads, cut into pieces: products of packed weights, and attention.
// Used alone by native.cpp's ops and in a row by stack.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "abi.h"
#include "dispatch.h"
#include "low_rank.h"
#include "memory.h"
#include "shapes.h"
#include "threads.h"

namespace {

double cost_of(const Matrix& m, int64_t rows) { return double(m.outputs) * m.columns() * (0.5 + 0.25 * rows); }

// Rows of activations as int8 blocks, in tiles of kTile rows. The constructor only takes memory.
struct Activations {
  int64_t rows = 0, blocks = 0;
  int8_t* values = nullptr;
  float* scale = nullptr;
  float* term[kKinds] = {};

  Activations() = default;
  Activations(int64_t rows, int64_t columns, Arena& arena)
      : rows(rows), blocks(columns / 32), values(arena.take<int8_t>(rows * columns)), scale(floats(arena)) {
    for (float*& t : term) t = floats(arena);
  }
  // The same memory for narrower rows.
  Activations narrowed(int64_t columns) const {
    Activations other = *this;
    other.blocks = columns / 32;
    return other;
  }
  // The memory of `count` rows from `first` on, as tiles of their own.
  Activations part(int64_t first, int64_t count) const {
    Activations other = *this;
    other.rows = count;
    other.values += 32 * first * blocks;
    other.scale += first * blocks;
    for (float*& t : other.term) t += first * blocks;
    return other;
  }
  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  Tile tile(int64_t i) const {
    const int64_t at = i * kTile * blocks;
    Tile tile{values + 32 * at, scale + at, {}, int(smaller(kTile, rows - i * kTile))};
    for (int kind = 0; kind < kKinds; ++kind) tile.term[kind] = term[kind] + at;
    return tile;
  }
  void put(int64_t row, const float* x) const {
    chosen->quantise_row(x, blocks, int(row % kTile), tile(row / kTile));
  }
  // x: rows `stride` floats apart.
  void quantise(Team& team, const float* x, int64_t stride) const {
    team.spread(rows, 1, 32.0 * rows * blocks, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) put(r, x + r * stride);
    });
  }

 private:
  float* floats(Arena& arena) const { return arena.take<float>(rows * blocks); }
};

// One of several products of the same activations: y [rows, outputs].
struct Product {
  const Matrix* matrix;
  float* y;
  Ascent low = {};
};

// Groups of 16 outputs to a piece: enough pieces that a slow core can leave some to the others, and not so many
// that claiming them costs.
int64_t piece_of(int64_t groups, int threads) { return larger(1, groups / (8 * larger(1, threads))); }

INLINE void multiply_group(const Product& product, const Activations& x, int64_t group) {
  const Matrix& m = *product.matrix;
  float* const y = product.y;
  const int count = int(smaller(16, m.outputs - group * 16));
  for (int64_t i = 0; i < x.tiles(); ++i) {
    const Tile tile = x.tile(i);
    float* to = y + i * kTile * m.outputs + group * 16;
    chosen->multiply(m.w, group, tile, to, m.outputs, count);
    if (m.bias)
      for (int r = 0; r < tile.rows; ++r) chosen->add_row(m.bias + group * 16, count, to + r * m.outputs);
    for (int r = 0; r < tile.rows; ++r) product.low.add(i * kTile + r, group, count, to + r * m.outputs);
  }
}

// Several products in one step.
void multiply(Team& team, const Activations& x, const Product* products, int count) {
  int64_t groups = 0;
  double cost = 0;
  for (int p = 0; p < count; ++p) {
    groups += products[p].matrix->groups();
    cost += cost_of(*products[p].matrix, x.rows);
  }
  team.spread(groups, piece_of(groups, team.threads()), cost, [&](int64_t begin, int64_t end, int) {
    int p = 0;
    int64_t before = 0;
    for (int64_t g = begin; g < end; ++g) {
      while (g - before >= products[p].matrix->groups()) before += products[p++].matrix->groups();
      multiply_group(products[p], x, g - before);
    }
  });
}

// The next shared product will be this one.
void expect(Team& team, const Product* products, int count) {
  int64_t groups = 0;
  for (int p = 0; p < count; ++p) groups += products[p].matrix->groups();
  for (int thread = 0; thread < team.threads(); ++thread) {
    int64_t group = team.first_of(groups, piece_of(groups, team.threads()), thread);
    int p = 0;
    while (p + 1 < count && group >= products[p].matrix->groups()) group -= products[p++].matrix->groups();
    const Matrix& m = *products[p].matrix;
    const int64_t size = m.w.blocks * 64 * m.w.bits;  // of a group
    team.expect(thread, m.w.q + group * size, (m.groups() - group) * size);
  }
}

// Groups of `gate` between two switches to `up`: long enough runs for memory, and weights of both that stay in the
// second-level cache for the next rows of a prefill.
constexpr int64_t kRun = 4;

// act(gate x) * (up x) of groups group .. group + groups - 1 (kRun at the most), into the gate's y [rows, outputs].
void multiply_gated_run(const Activations& x, const Product& gate, const Product& up, bool gelu, int64_t group,
                        int64_t groups) {
  float open[kTile * kRun * 16], flow[kTile * kRun * 16];
  const int64_t width = gate.matrix->outputs, stride = groups * 16, columns = smaller(stride, width - group * 16);
  const auto run = [&](const Product& product, const Tile& tile, int64_t row, float* to) {
    const Matrix& m = *product.matrix;
    for (int64_t j = 0; j < groups; ++j)
      chosen->multiply(m.w, group + j, tile, to + j * 16, stride, int(smaller(16, columns - j * 16)));
    if (m.bias)
      for (int r = 0; r < tile.rows; ++r) chosen->add_row(m.bias + group * 16, columns, to + r * stride);
    for (int64_t j = 0; product.low.all && j < groups; ++j)
      for (int r = 0; r < tile.rows; ++r)
        product.low.add(row + r, group + j, int(smaller(16, columns - j * 16)), to + r * stride + j * 16);
  };
  for (int64_t i = 0; i < x.tiles(); ++i) {
    const Tile tile = x.tile(i);
    run(gate, tile, i * kTile, open);
    run(up, tile, i * kTile, flow);
    for (int r = 0; r < tile.rows; ++r) {
      float* to = gate.y + (i * kTile + r) * width + group * 16;
      chosen->gate_row(open + r * stride, flow + r * stride, columns, gelu, to);
    }
  }
}

// act(gate x) * (up x), [rows, outputs], into the gate's y.
void multiply_gated(Team& team, const Activations& x, const Product& gate, const Product& up, bool gelu) {
  const int64_t groups = gate.matrix->groups();
  const double cost = cost_of(*gate.matrix, x.rows) + cost_of(*up.matrix, x.rows);
  team.spread(groups, piece_of(groups, team.threads()), cost, [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; g += kRun)
      multiply_gated_run(x, gate, up, gelu, g, smaller(kRun, end - g));
  });
}

// Fills in low, high and span; false when a row sees more positions than there are slots.
bool bounds_of(Attention& a) {
  a.low = std::numeric_limits<int64_t>::max();
  a.high = 0;
  for (int64_t t = 0; t < a.rows; ++t) {
    const int64_t count = larger(0, a.end[t] - a.first[t]);
    if (count > a.store->slots || (count && a.first[t] < 0)) return false;
    if (count) {
      a.low = smaller(a.low, a.first[t]);
      a.high = larger(a.high, a.end[t]);
    }
  }
  a.low = smaller(a.low, a.high);
  a.span = larger(1, a.high - a.low);
  return true;
}

double cost_of(const Attention& a) {
  return double(a.rows) * double(a.high - a.low) * a.heads * (a.store->width + a.store->value_width);
}

// Memory of attention: scores of as many rows as fit kScores floats (one at least), and a tile per thread.
struct AttentionScratch {
  static constexpr int64_t kScores = 1 << 21;
  int64_t rows = 0, tile = 0;
  float* scores = nullptr;
  float* over = nullptr;
  float* tiles = nullptr;

  AttentionScratch() = default;
  AttentionScratch(const Attention& a, int threads, Arena& arena)
      : AttentionScratch(a.rows, a.heads, a.span, larger(a.store->width, a.store->value_width), threads, arena) {}
  AttentionScratch(int64_t all, int64_t heads, int64_t span, int64_t width, int threads, Arena& arena)
      : rows(smaller(all, larger(1, kScores / (heads * span)))),
        tile(larger(kPositions * width, kSpread)),
        scores(arena.take<float>(rows * heads * span)),
        over(arena.take<float>(rows * heads)),
        tiles(arena.take<float>(tile * larger(1, threads))) {}
};

void attend(Team& team, const Attention& all, const AttentionScratch& space) {
  const KV& s = *all.store;
  for (int64_t at = 0; at < all.rows; at += space.rows) {
    Attention a = all;
    a.rows = smaller(space.rows, all.rows - at);
    a.q += at * a.heads * s.width;
    a.y += at * a.heads * s.value_width;
    a.first += at;
    a.end += at;
    a.scores = space.scores;
    a.over = space.over;
    bounds_of(a);
    // some pieces for each thread, also of a short text
    const int64_t fair = a.span * a.kv_heads / (4 * team.threads()) & ~int64_t(15);
    const int64_t step = larger(16, smaller(fair, kPositions));
    const int64_t columns = a.kv_heads * s.value_width < 4 * team.threads() * kColumns ? kColumns / 2 : kColumns;
    const int64_t tiles = (a.span + step - 1) / step, parts = (s.value_width + columns - 1) / columns;
    const double cost = cost_of(a) / 2;
    team.spread(a.kv_heads * tiles, 1, cost, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = a.low + i % tiles * step;
        chosen->score(a, i / tiles, from, smaller(from + step, a.high), space.tiles + thread * space.tile);
      }
    });
    team.spread(a.rows * a.heads, 1, 16.0 * a.rows * a.heads * a.span, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) chosen->softmax_row(a, i / a.heads, i % a.heads);
    });
    team.spread(a.kv_heads * parts, 1, cost, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % parts * columns;
        chosen->weighted_values(a, i / parts, column, smaller(columns, s.value_width - column),
                                space.tiles + thread * space.tile);
      }
    });
  }
}

// A head's row, in the store's type: bfloat16 to the nearest (even), int8 as reference.py's quantise_store has it.
void keep(const KV& s, const Plane& plane, int64_t head, int64_t slot, const float* from, int64_t width) {
  const int64_t at = head * plane.head + slot * plane.slot;
  if (s.type == kFloat32) {
    std::memcpy(static_cast<float*>(const_cast<void*>(plane.data)) + at, from, sizeof(float) * width);
  } else if (s.type == kBfloat16) {
    uint16_t* to = static_cast<uint16_t*>(const_cast<void*>(plane.data)) + at;
    for (int64_t i = 0; i < width; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      to[i] = from[i] != from[i] ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  } else {
    int8_t* to = static_cast<int8_t*>(const_cast<void*>(plane.data)) + at;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      const float size = std::fabs(from[i]);
      finite = finite && size < std::numeric_limits<float>::infinity();
      largest = size > largest ? size : largest;
    }
    const bool usable = finite && largest >= 1e-30f;
    const float inverse = usable ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < width; ++i) to[i] = usable ? int8_t(std::nearbyint(from[i] * inverse)) : int8_t(0);
    const_cast<float*>(plane.scale)[head * s.slots + slot] =
        finite ? (usable ? largest / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace
