// Decoder layers, whole: what specdec/model/stack.py does op by op, in one call and to the same bits. Between the
// products a row is finished by one thread in one go (bias, norm, residual, the next norm, quantisation), so that a
// layer is seven shared steps.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "abi.h"
#include "dispatch.h"
#include "low_rank.h"
#include "memory.h"
#include "mixture.h"
#include "shapes.h"
#include "steps.h"
#include "threads.h"

namespace {

struct Stack {
  const Layer* layers;
  int64_t count;
  const Span* spans;
  Texts texts;
  const float* final_norm;  // null: no norm after the last layer
  float* x;
  int64_t rows, hidden;
  const float* extra;
  int64_t extra_width;
  float* const* aux;  // [count]: where a layer's output [rows, hidden] is wanted too, else null; null: nowhere
  Work work = kAll;   // kKeys leaves x as it is

  // The widest of everything, over all layers.
  int64_t columns = 0, queries = 0, keys = 0, inner = 0;
  int64_t part = 0;  // floats of scratch that one thread needs for a row
  double cost = 0;

  // Buffers, [rows, width] each.
  float *q = nullptr, *k = nullptr, *v = nullptr, *y = nullptr, *z = nullptr, *wide = nullptr, *space = nullptr;
  int64_t* owner = nullptr;  // [rows]: the text that a row belongs to
  LowRanks low = {};
  MixtureSpace mixture = {};

  int run(int threads) {
    int64_t positions = 1, heads = 1, width = 1, longest = 1;
    for (int64_t i = 0; i < texts.count; ++i) longest = larger(longest, texts.starts[i + 1] - texts.starts[i]);
    for (int64_t i = 0; i < count; ++i) {
      const Layer& l = layers[i];
      for (int64_t text = 0; text < texts.count; ++text) {
        Attention a = attention_of(l, text);
        if (!bounds_of(a)) return 2;
        positions = larger(positions, a.span);
      }
      heads = larger(heads, l.heads);
      width = larger(width, l.head_dim);
      queries = larger(queries, l.heads * l.head_dim);
      keys = larger(keys, l.kv_heads * l.head_dim);
      inner = larger(larger(inner, l.gate.outputs), extra_width);
      for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.ple_gate, &l.ple_projection}) {
        if (!m->present()) continue;
        columns = larger(columns, m->columns());
        cost += cost_of(*m, rows);
      }
      if (const Mixture* m = l.experts) cost += 3.0 * m->used * rows * m->width * hidden;
    }
    part = (larger(larger(hidden, queries), keys) + 31) & ~int64_t(15);
    low = LowRanks(texts, count, rows, hidden);
    // The first is for all threads together too, see attend_all.
    const int apart = texts.count == 1 ? 1 : threads;
    const auto spaces = [&](Arena& arena, AttentionScratch* to) {
      for (int i = 0; i < (apart < Team::kMost ? larger(1, apart) : Team::kMost); ++i)
        to[i] = AttentionScratch(longest, heads, positions, width, i == 0 ? threads : 1, arena);
    };
    AttentionScratch attention[Team::kMost];
    Arena sizes;
    take(threads, sizes);
    Activations(rows, columns, sizes);
    spaces(sizes, attention);
    const Scratch scratch(sizes.used());
    if (!scratch.data) return 1;
    Arena arena(scratch.data);
    take(threads, arena);
    const Activations activations(rows, columns, arena);
    spaces(arena, attention);
    for (int64_t text = 0; text < texts.count; ++text)
      for (int64_t r = texts.starts[text]; r < texts.starts[text + 1]; ++r) owner[r] = text;
    with_team(threads, cost, [&](Team& team) {
      for (int64_t i = 0; i < count; ++i) layer(team, i, activations, attention);
    });
    return 0;
  }

 private:
  // Below this, in operations, the attention of one of several texts stays on one thread.
  static constexpr double kWorthDividing = 16 * Team::kWorthSharing;

  void take(int threads, Arena& arena) {
    q = arena.take<float>(rows * queries);
    k = arena.take<float>(rows * keys);
    v = arena.take<float>(rows * keys);
    y = arena.take<float>(rows * queries);
    z = arena.take<float>(rows * hidden);
    wide = arena.take<float>(rows * inner);
    space = arena.take<float>(2 * part * larger(1, threads));
    owner = arena.take<int64_t>(rows);
    low.take(arena, owner);
    mixture = MixtureSpace(layers, count, rows, hidden, arena);
  }

  const KV& store_of(const Layer& l, int64_t text) const { return texts.stores[text][l.store]; }

  Attention attention_of(const Layer& l, int64_t text) const {
    const Span& span = spans[l.kind];
    const int64_t at = texts.starts[text], width = l.heads * l.head_dim;
    return Attention{q + at * width, y + at * width, &store_of(l, text), span.first + at, span.end + at,
                     texts.starts[text + 1] - at, l.heads, l.kv_heads, l.scale};
  }

  // A text with more than half of a thread's share of the work is attended to by all threads together, or the others
  // would wait for the one that has it: a chunk of a long prompt beside texts that decode. The rest is shared out whole.
  void attend_all(Team& team, const Layer& l, const AttentionScratch* spaces) const {
    if (texts.count == 1) return attend(team, attention_of(l, 0), spaces[0]);
    const auto cost_at = [&](int64_t text) {
      Attention a = attention_of(l, text);
      bounds_of(a);
      return cost_of(a);
    };
    double work = 0, rest = 0;
    for (int64_t text = 0; text < texts.count; ++text) work += cost_at(text);
    const double share = work / (2 * team.threads()), large = share > kWorthDividing ? share : kWorthDividing;
    for (int64_t text = 0; text < texts.count; ++text) {
      if (cost_at(text) > large) {
        attend(team, attention_of(l, text), spaces[0]);
      } else {
        rest += cost_at(text);
      }
    }
    team.spread(texts.count, 1, rest, [&](int64_t begin, int64_t end, int thread) {
      Team alone;
      for (int64_t text = begin; text < end; ++text)
        if (cost_at(text) <= large) attend(alone, attention_of(l, text), spaces[thread]);
    });
  }

  void norm(const Layer& l, const float* from, const float* weight, int64_t width, float* to, int thread) const {
    chosen->norm(from, weight, width, l.eps, to, space + (2 * thread + 1) * part);
  }

  // Row by row: body(row, thread). `width`: floats that a row's work touches.
  template <class Body>
  void each_row(Team& team, int64_t width, const Body& body) const {
    team.spread(rows, 1, 16.0 * rows * width, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t r = begin; r < end; ++r) body(r, thread);
    });
  }

  // norm(x) as the activations of the next products.
  void prepare(const Layer& l, const float* weight, int64_t row, const Activations& to, int thread) const {
    float* normed = low.any() ? low.normed + row * hidden : space + 2 * thread * part;
    norm(l, x + row * hidden, weight, hidden, normed, thread);
    to.put(row, normed);
  }

  // The product with the matrix `m` of layer `index`, whose low-rank part is the `slot`-th of `parts`.
  Product product(int64_t index, const Matrix& m, float* to, const Part* parts, int slot = 0) const {
    return {&m, to, {&low, index, parts[slot], slot}};
  }

  // x += norm(z)
  void add(const Layer& l, const float* weight, int64_t row, int thread) const {
    float* from = z + row * hidden;
    if (weight) {
      float* normed = space + 2 * thread * part;
      norm(l, from, weight, hidden, normed, thread);
      from = normed;
    }
    chosen->add_row(from, hidden, x + row * hidden);
  }

  void layer(Team& team, int64_t index, const Activations& memory, const AttentionScratch* attention) {
    const Layer& l = layers[index];
    const Activations narrow = memory.narrowed(hidden), attended = memory.narrowed(l.heads * l.head_dim),
                      activated = memory.narrowed(l.gate.outputs);
    if (index == 0)
      each_row(team, hidden, [&](int64_t r, int thread) { prepare(l, l.input_norm, r, narrow, thread); });
    Product projections[3];
    const int made = projections_of(index, projections);
    const Product out = product(index, l.o, z, kOut), down = product(index, l.down, z, kDown);
    const Product gate = product(index, l.gate, wide, kGateUp), up = product(index, l.up, nullptr, kGateUp, 1);
    low.descend(team, index, kQKV, low.normed, hidden);
    expect(team, &out, 1);
    multiply(team, narrow, projections, made);
    each_row(team, (l.heads + 2 * l.kv_heads) * l.head_dim, [&](int64_t r, int thread) { place(l, r, thread); });
    if (work == kKeys) return;
    attend_all(team, l, attention);
    attended.quantise(team, y, l.heads * l.head_dim);
    low.descend(team, index, kOut, y, l.heads * l.head_dim);
    expect(team, &gate, 1);
    multiply(team, attended, &out, 1);
    each_row(team, 3 * hidden, [&](int64_t r, int thread) {
      add(l, l.attention_post_norm, r, thread);
      prepare(l, l.mlp_norm, r, narrow, thread);
      if (!l.experts) return;
      norm(l, x + r * hidden, l.experts->router_scale, hidden, mixture.router_in + r * hidden, thread);
      norm(l, x + r * hidden, l.experts->pre_norm, hidden, mixture.expert_in + r * hidden, thread);
    });
    if (l.experts) mixture.route(team, *l.experts);
    low.descend(team, index, kGateUp, low.normed, hidden);
    expect(team, &down, 1);
    multiply_gated(team, narrow, gate, up, l.activation != kSilu);
    activated.quantise(team, wide, l.gate.outputs);
    low.descend(team, index, kDown, wide, l.gate.outputs);
    const auto expect_next = [&] {
      Product following[3];
      if (index + 1 < count) expect(team, following, projections_of(index + 1, following));
    };
    l.experts ? mixture.expect_experts(team, *l.experts) : expect_next();
    multiply(team, activated, &down, 1);
    if (l.experts) {
      mixture.run(team, *l.experts, l.eps, l.activation != kSilu, z, space, part);
      expect_next();
    }
    if (l.ple_gate.present()) feed(team, index, memory);
    each_row(team, 3 * hidden, [&](int64_t r, int thread) {
      add(l, l.ple_gate.present() ? l.ple_norm : l.mlp_post_norm, r, thread);
      if (l.scalar) chosen->scale_row(*l.scalar, hidden, x + r * hidden);
      if (aux && aux[index]) std::memcpy(aux[index] + r * hidden, x + r * hidden, sizeof(float) * hidden);
      if (index + 1 < count) {
        prepare(layers[index + 1], layers[index + 1].input_norm, r, narrow, thread);
      } else if (final_norm) {
        float* normed = space + 2 * thread * part;
        norm(l, x + r * hidden, final_norm, hidden, normed, thread);
        std::memcpy(x + r * hidden, normed, sizeof(float) * hidden);
      }
    });
  }

  // The projections of attention of layer `index`, and how many they are.
  int projections_of(int64_t index, Product (&products)[3]) const {
    const Layer& l = layers[index];
    int made = 0;
    if (work != kKeys) products[made++] = product(index, l.q, q, kQKV);
    if (work == kRest) return made;
    if (l.k.present()) products[made++] = product(index, l.k, k, kQKV, 1);
    if (l.v.present()) products[made++] = product(index, l.v, v, kQKV, 2);
    return made;
  }

  // Norm and rotation of a row's queries and keys; its K and V go to the store.
  void place(const Layer& l, int64_t row, int thread) const {
    const Span& span = spans[l.kind];
    const int64_t width = l.head_dim;
    const float *cos = span.cos + row * width, *sin = span.sin + row * width;
    float* one = space + 2 * thread * part;
    // through `one`, because turning a head needs both of its halves
    const auto turned = [&](const float* from, const float* weight, float* to) {
      if (weight) {
        norm(l, from, weight, width, one, thread);
      } else {
        std::memcpy(one, from, sizeof(float) * width);
      }
      chosen->rope_row(one, cos, sin, 1, width, to);
    };
    float* queries = q + row * l.heads * width;
    for (int64_t h = 0; work != kKeys && h < l.heads; ++h)
      turned(queries + h * width, l.q_norm, queries + h * width);
    if (work == kRest || !l.k.present()) return;
    const int64_t text = owner[row];
    const KV& s = store_of(l, text);
    const int64_t slot = (texts.positions[text] + row - texts.starts[text]) % s.slots;
    float* made = space + (2 * thread + 1) * part;  // the norm's own scratch, free again
    for (int64_t h = 0; h < l.kv_heads; ++h) {
      const float* raw = k + (row * l.kv_heads + h) * width;
      const float* value = l.v.present() ? v + (row * l.kv_heads + h) * width : raw;
      if (l.norm_values) {
        norm(l, value, nullptr, width, one, thread);
        value = one;
      }
      keep(s, s.values, h, slot, value, width);
      if (!s.keys.data) continue;  // made from the value again, by whoever reads it
      turned(raw, l.k_norm, made);
      keep(s, s.keys, h, slot, made, width);
    }
  }

  // Gemma 4 E2B/E4B: the MLP's own residual, then a gated projection of the row's per-layer input into z.
  void feed(Team& team, int64_t index, const Activations& memory) const {
    const Layer& l = layers[index];
    const Activations narrow = memory.narrowed(hidden), gated = memory.narrowed(extra_width);
    each_row(team, 2 * hidden, [&](int64_t r, int thread) {
      add(l, l.mlp_post_norm, r, thread);
      narrow.put(r, x + r * hidden);
    });
    const Product gate = product(index, l.ple_gate, wide, kPleGate);
    low.descend(team, index, kPleGate, x, hidden);
    multiply(team, narrow, &gate, 1);
    each_row(team, extra_width, [&](int64_t r, int) {
      float* row = wide + r * extra_width;
      chosen->gate_row(row, extra + (r * count + index) * extra_width, extra_width, l.activation != kSilu, row);
      gated.put(r, row);
    });
    const Product projection = product(index, l.ple_projection, z, kPleProjection);
    low.descend(team, index, kPleProjection, wide, extra_width);
    multiply(team, gated, &projection, 1);
  }
};

}  // namespace
