// A mixture of experts beside a layer's MLP: what specdec/model/experts.py does op by op, to the same bits.
//
// A row's router chooses its experts, rows that chose the same expert share its products, and a row's sum takes its
// experts in the order of their numbers. Experts that nobody chose are not read. The experts of a pass are taken some
// at a time: scratch memory holds the outputs of some pairs of a row and an expert, not of all.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "dispatch.h"
#include "memory.h"
#include "shapes.h"
#include "steps.h"
#include "threads.h"

namespace {

// The rows of packed weights from `row`, a multiple of 16, on.
Weights rows_from(const Weights& w, int64_t row) {
  Weights part = w;
  const int64_t blocks = row / 16 * w.blocks;
  part.q += blocks * 64 * w.bits;
  part.scale += blocks * 16;
  if (w.minimum) part.minimum += blocks * 16;
  if (w.sub) part.sub += blocks * 32;
  return part;
}

// The scratch memory of the mixtures of a pass, one layer after the other, and the steps that work in it.
class MixtureSpace {
 public:
  MixtureSpace() = default;
  // Of the widest of `layers`; without a mixture nothing is taken. The constructor only takes memory.
  MixtureSpace(const Layer* layers, int64_t count, int64_t rows, int64_t hidden, Arena& arena)
      : rows_(rows), hidden_(hidden) {
    int64_t scores = 0, used = 0, experts = 0, width = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Mixture* m = layers[i].experts;
      if (!m) continue;
      scores = larger(scores, m->router.rank), experts = larger(experts, m->count);
      used = larger(used, m->used), width = larger(width, m->width);
    }
    if (!used) return;
    most_pairs_ = smaller(rows * used, larger(rows, kPairs));
    router_in = arena.take<float>(rows * hidden);
    expert_in = arena.take<float>(rows * hidden);
    mixed_ = arena.take<float>(rows * hidden);
    scores_ = arena.take<float>(rows * scores);
    ids_ = arena.take<int64_t>(rows * used);
    shares_ = arena.take<float>(rows * used);
    wide_ = arena.take<float>(most_pairs_ * width);
    out_ = arena.take<float>(most_pairs_ * hidden);
    row_of_ = arena.take<int64_t>(rows * used);
    pair_of_ = arena.take<int64_t>(rows * used);
    begin_ = arena.take<int64_t>(experts + 1);
    active_ = arena.take<int64_t>(experts);
    in_ = Activations(most_pairs_, hidden, arena);
    inner_ = Activations(most_pairs_, width, arena);
  }

  // Rows [rows, hidden], filled in by the caller: normed as the router reads them, and as the experts do.
  float* router_in = nullptr;
  float* expert_in = nullptr;

  // Chooses the experts of all rows, and tells `use` which those are.
  void route(Team& team, const Mixture& m) {
    const int64_t chunks = m.router.rank / kRanks, used = m.used;
    team.spread(chunks, 1, double(rows_) * m.router.rank * hidden_, [&](int64_t begin, int64_t end, int) {
      for (int64_t rank = begin * kRanks; rank < end * kRanks; rank += kRanks)
        for (int64_t r = 0; r < rows_; ++r)
          chosen->descend(m.router, rank, hidden_, router_in + r * hidden_, scores_ + r * m.router.rank + rank);
    });
    team.spread(rows_, 1, 2.0 * rows_ * m.count * used, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r)
        choose(m, scores_ + r * m.router.rank, ids_ + r * used, shares_ + r * used);
    });
    for (int64_t e = 0; e <= m.count; ++e) begin_[e] = 0;
    for (int64_t i = 0; i < rows_ * used; ++i) begin_[ids_[i] + 1] += 1;
    active_count_ = 0;
    for (int64_t e = 0; e < m.count; ++e) {
      if (begin_[e + 1]) active_[active_count_++] = e;
      begin_[e + 1] += begin_[e];
    }
    // row by row, so that an expert's rows ascend; afterwards begin_[e] is the end of e's, and they move up by one
    for (int64_t i = 0; i < rows_ * used; ++i) row_of_[pair_of_[i] = begin_[ids_[i]]++] = i / used;
    for (int64_t e = m.count; e > 0; --e) begin_[e] = begin_[e - 1];
    begin_[0] = 0;
    if (m.use) m.use(m.layer, active_, active_count_);
  }

  // The next shared product will be that of the experts' gates.
  void expect_experts(Team& team, const Mixture& m) const {
    const int64_t inner = m.width / 16, groups = active_count_ * inner, size = m.gate_up.blocks * 64 * m.gate_up.bits;
    for (int thread = 0; thread < team.threads(); ++thread) {
      const int64_t first = team.first_of(groups, piece_of(groups, team.threads()), thread);
      const int64_t e = active_[smaller(first / inner, active_count_ - 1)], group = first % inner;
      team.expect(thread, m.gate_up.q + (2 * e * inner + group) * size, (inner - group) * size);
    }
  }

  // z [rows, hidden] = norm(z) + norm(the weighted sum of what each row's experts make of `expert_in`). `part`: floats
  // of `space` between the scratch of two threads.
  void run(Team& team, const Mixture& m, float eps, bool gelu, float* z, float* space, int64_t part) {
    std::memset(mixed_, 0, sizeof(float) * size_t(rows_ * hidden_));
    for (int64_t first = 0, last = 0; first < active_count_; first = last) {
      const int64_t low = begin_[active_[first]];
      while (last < active_count_ && begin_[active_[last] + 1] - low <= most_pairs_) ++last;
      multiply_some(team, m, gelu, first, last);
      const int64_t high = begin_[active_[last - 1] + 1];
      team.spread(rows_, 1, 2.0 * (high - low) * hidden_, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) add_pairs(m, r, low, high);
      });
    }
    team.spread(rows_, 1, 16.0 * rows_ * hidden_, [&](int64_t begin, int64_t end, int thread) {
      float* scratch = space + 2 * thread * part;
      for (int64_t r = begin; r < end; ++r) {
        float *dense = z + r * hidden_, *mixed = mixed_ + r * hidden_;
        chosen->norm(dense, m.dense_norm, hidden_, eps, dense, scratch);
        chosen->norm(mixed, m.post_norm, hidden_, eps, mixed, scratch);
        chosen->add_row(mixed, hidden_, dense);
      }
    });
  }

 private:
  static constexpr int64_t kPairs = 128;  // pairs of a row and an expert whose outputs are held, or as many as rows

  int64_t rows_ = 0, hidden_ = 0, most_pairs_ = 0, active_count_ = 0;
  float *mixed_ = nullptr, *scores_ = nullptr, *shares_ = nullptr, *wide_ = nullptr, *out_ = nullptr;
  // Of each row its experts [rows, used], the best first, and their pairs; pairs are ordered by expert, then by row.
  int64_t *ids_ = nullptr, *pair_of_ = nullptr, *row_of_ = nullptr;
  int64_t* begin_ = nullptr;   // [experts + 1]: the first pair of each expert
  int64_t* active_ = nullptr;  // [active_count_]: the experts that any row uses, ascending
  Activations in_, inner_;

  // The best `used` of a row's scores, the first of equals and NaN before all, with their part of the softmax of these.
  static void choose(const Mixture& m, const float* scores, int64_t* ids, float* shares) {
    const auto better = [&](int64_t a, int64_t b) {
      return scores[a] > scores[b] || (scores[a] != scores[a] && scores[b] == scores[b]);
    };
    for (int64_t e = 0, kept = 0; e < m.count; ++e) {
      if (kept == m.used && !better(e, ids[kept - 1])) continue;
      int64_t at = kept < m.used ? kept++ : kept - 1;
      for (; at > 0 && better(e, ids[at - 1]); --at) ids[at] = ids[at - 1];
      ids[at] = e;
    }
    const double top = scores[ids[0]];
    double total = 0;
    for (int64_t i = 0; i < m.used; ++i) total += std::exp(double(scores[ids[i]]) - top);
    for (int64_t i = 0; i < m.used; ++i)
      shares[i] = float(std::exp(double(scores[ids[i]]) - top) / total * double(m.expert_scale[ids[i]]));
  }

  // The pairs of the chosen experts `first` .. `last` - 1 through their matrices, to `out_`.
  void multiply_some(Team& team, const Mixture& m, bool gelu, int64_t first, int64_t last) {
    const int64_t low = begin_[active_[first]], pairs = begin_[active_[last - 1] + 1] - low, experts = last - first;
    const int64_t inner = m.width / 16, outer = hidden_ / 16;
    const auto gate_of = [&](int64_t e) { return Matrix{rows_from(m.gate_up, e * 2 * m.width), nullptr, m.width}; };
    const auto up_of = [&](int64_t e) { return Matrix{rows_from(m.gate_up, (2 * e + 1) * m.width), nullptr, m.width}; };
    const auto down_of = [&](int64_t e) { return Matrix{rows_from(m.down, e * hidden_), nullptr, hidden_}; };
    const auto first_of = [&](int64_t e) { return begin_[e] - low; };
    const auto rows_of = [&](int64_t e) { return begin_[e + 1] - begin_[e]; };
    // row_at(i): the floats of the i-th pair
    const auto put_rows = [&](const Activations& all, int64_t columns, const auto& row_at) {
      team.spread(experts, 1, 1.0 * pairs * columns, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t e = active_[first + i];
          const Activations part = all.part(first_of(e), rows_of(e));
          for (int64_t r = 0; r < part.rows; ++r) part.put(r, row_at(first_of(e) + r));
        }
      });
    };
    const Activations activated = inner_.narrowed(m.width);
    if (rows_ == 1) {  // all of its experts read the same
      in_.part(0, 1).put(0, expert_in);
    } else {
      put_rows(in_, hidden_, [&](int64_t i) { return expert_in + row_of_[low + i] * hidden_; });
    }
    double cost = 0;
    for (int64_t i = first; i < last; ++i) cost += 2 * cost_of(gate_of(active_[i]), rows_of(active_[i]));
    each_group(team, experts, inner, cost, [&](int64_t i, int64_t begin, int64_t end) {
      const int64_t e = active_[first + i];
      const Matrix gate = gate_of(e), up = up_of(e);
      const Product open{&gate, wide_ + first_of(e) * m.width}, flow{&up, nullptr};
      const Activations x = rows_ == 1 ? in_.part(0, 1) : in_.part(first_of(e), rows_of(e));
      for (int64_t g = begin; g < end; g += kRun) multiply_gated_run(x, open, flow, gelu, g, smaller(kRun, end - g));
    });
    put_rows(activated, m.width, [&](int64_t i) { return wide_ + i * m.width; });
    each_group(team, experts, outer, cost / 2, [&](int64_t i, int64_t begin, int64_t end) {
      const int64_t e = active_[first + i];
      const Matrix down = down_of(e);
      const Activations x = activated.part(first_of(e), rows_of(e));
      for (int64_t g = begin; g < end; ++g) multiply_group({&down, out_ + first_of(e) * hidden_}, x, g);
    });
  }

  // body(i, begin, end): groups begin .. end - 1 of the i-th of `experts` matrices of `groups` groups each.
  template <class Body>
  void each_group(Team& team, int64_t experts, int64_t groups, double cost, const Body& body) {
    team.spread(experts * groups, piece_of(experts * groups, team.threads()), cost,
                [&](int64_t begin, int64_t end, int) {
                  while (begin < end) {
                    const int64_t i = begin / groups, stop = smaller(end, (i + 1) * groups);
                    body(i, begin - i * groups, stop - i * groups);
                    begin = stop;
                  }
                });
  }

  // Adds the outputs of a row's pairs low .. high - 1, by ascending expert, to its sum.
  void add_pairs(const Mixture& m, int64_t row, int64_t low, int64_t high) {
    for (int64_t pair = low; pair < high;) {
      int64_t next = high, share = 0;
      for (int64_t i = row * m.used; i < (row + 1) * m.used; ++i)
        if (pair_of_[i] >= pair && pair_of_[i] < next) next = pair_of_[i], share = i;
      if (next == high) return;
      float* y = out_ + (next - low) * hidden_;
      chosen->scale_row(shares_[share], hidden_, y);
      chosen->add_row(y, hidden_, mixed_ + row * hidden_);
      pair = next + 1;
    }
  }
};

}  // namespace
