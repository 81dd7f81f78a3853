// Low-rank parts of a layer's matrices (LoRA): what a text's adapter adds to a product, up * (scale * (down * x)), kept
// apart from the weights, so that texts with other adapters, or without one, share a pass.
//
// A product is preceded by a shared step, `descend`, that leaves scale * (down * x) of each row; `ascend` adds up times
// that to a group of outputs as soon as the product has made it. The arithmetic is written down in reference.py.

#pragma once

#include <cstdint>

#include "abi.h"
#include "dispatch.h"
#include "memory.h"
#include "shapes.h"
#include "threads.h"

namespace {

// The texts that the rows of a pass belong to: rows starts[i] .. starts[i + 1] - 1 are text i's, from position
// positions[i] on (null where no layer stores K and V), stores[i] its stores, and adapters[i] the low-rank parts of the
// layers, the first layer's first (null: it has none; all of it null: no text has any).
struct Texts {
  int64_t count;
  const int64_t* starts;
  const int64_t* positions;
  const KV* const* stores;
  const LayerAdapter* const* adapters = nullptr;
};

// Which of a layer's matrices: those that read the same rows.
using Part = LowRank LayerAdapter::*;
constexpr Part kQKV[] = {&LayerAdapter::q, &LayerAdapter::k, &LayerAdapter::v}, kOut[] = {&LayerAdapter::o},
               kGateUp[] = {&LayerAdapter::gate, &LayerAdapter::up}, kDown[] = {&LayerAdapter::down},
               kPleGate[] = {&LayerAdapter::ple_gate}, kPleProjection[] = {&LayerAdapter::ple_projection};

// The low-rank parts of a pass. `owner` [rows]: the text of each row.
struct LowRanks {
  static constexpr int kTogether = 3;  // products of the same rows: q, k and v
  const LayerAdapter* const* adapters = nullptr;
  int64_t rows = 0, ranks = 0, columns = 0;  // the most ranks of a matrix, and the most columns of normed rows
  const int64_t* owner = nullptr;
  float* low = nullptr;     // [rows, kTogether, ranks]
  float* normed = nullptr;  // [rows, columns]: what products read as int8

  LowRanks() = default;
  // Of `layers` layers. Without adapters nothing is taken.
  LowRanks(const Texts& texts, int64_t layers, int64_t rows, int64_t columns)
      : adapters(texts.adapters), rows(rows), columns(columns) {
    for (int64_t text = 0; adapters && text < texts.count; ++text)
      for (int64_t i = 0; adapters[text] && i < layers; ++i)
        for (const LowRank& part : parts_of(adapters[text][i])) ranks = larger(ranks, part.rank);
    if (!ranks) adapters = nullptr;
  }
  void take(Arena& arena, const int64_t* of_rows) {
    owner = of_rows;
    low = arena.take<float>(rows * kTogether * ranks);
    normed = arena.take<float>(adapters ? rows * columns : 0);
  }
  bool any() const { return adapters != nullptr; }

  // Null: the row's text has no such part.
  const LowRank* of(int64_t row, int64_t layer, Part part) const {
    const LayerAdapter* adapter = adapters[owner[row]];
    return adapter && (adapter[layer].*part).rank ? &(adapter[layer].*part) : nullptr;
  }

  // scale * (down * x) of all rows x [rows, width], for the matrices of a layer that read them.
  template <int count>
  void descend(Team& team, int64_t layer, const Part (&parts)[count], const float* x, int64_t width) const {
    if (!any()) return;
    const int64_t chunks = ranks / kRanks;
    double cost = 0;
    for (int slot = 0; slot < count; ++slot)
      for (int64_t r = 0; r < rows; ++r)
        if (const LowRank* part = of(r, layer, parts[slot])) cost += double(part->rank) * width;
    if (cost == 0) return;
    team.spread(count * chunks, 1, cost, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = i / chunks, rank = i % chunks * kRanks;
        for (int64_t r = 0; r < rows; ++r) {
          const LowRank* part = of(r, layer, parts[slot]);
          if (part && rank < part->rank) chosen->descend(*part, rank, width, x + r * width, at(r, int(slot)) + rank);
        }
      }
    });
  }

  float* at(int64_t row, int slot) const { return low + (row * kTogether + slot) * ranks; }

 private:
  static const LowRank (&parts_of(const LayerAdapter& adapter))[sizeof(LayerAdapter) / sizeof(LowRank)] {
    return reinterpret_cast<const LowRank(&)[sizeof(LayerAdapter) / sizeof(LowRank)]>(adapter);
  }
};

// What is added to one product: the `slot`-th of those that `descend` was called for together.
struct Ascent {
  const LowRanks* all = nullptr;
  int64_t layer = 0;
  Part part = nullptr;
  int slot = 0;

  // Outputs 16 * group .. + count - 1 of `row`, at `y`.
  void add(int64_t row, int64_t group, int count, float* y) const {
    if (!all || !all->any()) return;
    if (const LowRank* found = all->of(row, layer, part)) chosen->ascend(*found, group, all->at(row, slot), count, y);
  }
};

}  // namespace
