// A whole draft in one call: what drafter/mtp_drafter.py does step by step, to the same bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../abi.h"
#include "../dispatch.h"
#include "../memory.h"
#include "../shapes.h"
#include "../stack.h"
#include "../steps.h"
#include "../threads.h"

namespace {

// Moves those of scores [count] that may be sampled to the front, their tokens to `kept`; returns how many. `ids`: as
// in Drafter. A score that is `kTail` below the top counts for nothing. Here and not in isa/: what std::sort is made of
// must not be compiled for a processor that the program may not run on.
int64_t truncate(float* scores, const int64_t* ids, int64_t count, const DraftSampling& sampling, int64_t* order,
                 int64_t* kept) {
  constexpr float kTail = 12;
  float top = 0;
  chosen->best_of(scores, count, &top);
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] > top - kTail) order[n++] = i;
  }
  const int64_t most = sampling.top_k > 0 && sampling.top_k < n ? sampling.top_k : n;
  const auto first = [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  if (most < n) {
    std::partial_sort(order, order + most, order + n, first);
  } else {
    std::sort(order, order + n, first);
  }
  n = most;
  double all = 0, before = 0;
  for (int64_t k = 0; k < n; ++k) all += std::exp(double(scores[order[k]]) - top);
  for (int64_t k = 0; k < n; ++k) {
    const double share = std::exp(double(scores[order[k]]) - top);
    if (k > 0 && (before >= sampling.top_p * all || share < sampling.min_p)) n = k;
    before += share;
  }
  std::sort(order, order + n);
  for (int64_t k = 0; k < n; ++k) {
    kept[k] = ids ? ids[order[k]] : order[k];
    scores[k] = scores[order[k]];  // order[k] >= k: nothing is overwritten that is still to be moved
  }
  return n;
}

// How likely a token is right that won with the noise of `key`, where the head's probability of it is `share`: `chance`
// of `Noise` in specdec/engine/sampling.py.
double chance_with_noise(double share, int64_t token, uint64_t key, double temperature) {
  const double noise = portable::gumbel(portable::noise_bits(uint64_t(token), key));
  const double lead = share * std::exp(std::min(temperature * noise, 80.0));
  return lead / (lead + (1 - share) * (1 + temperature));
}

// One row x through matrices of its width. False when out of memory.
bool multiply_row(const float* x, int64_t columns, const Product* products, int count, int threads) {
  Arena sizes;
  Activations(1, columns, sizes);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return false;
  Arena arena(scratch.data);
  const Activations activations(1, columns, arena);
  double cost = 0;
  for (int p = 0; p < count; ++p) cost += cost_of(*products[p].matrix, 1);
  with_team(threads, cost, [&](Team& team) {
    activations.quantise(team, x, columns);
    multiply(team, activations, products, count);
  });
  return true;
}

// `steps` tokens after `newest`, whose choice came from the backbone's state `hidden`; `aux` [d.aux]: the outputs of
// other layers for the same row. `stack` is set up for one row.
// 1 when out of memory, 2 when the row sees more positions than a store has slots, 3 for an id that is no row.
// With `sampling` each token is the one whose logit times `sharpness` wins with the noise of its position. `made`: how
// many tokens there are, fewer than `steps` where the head is not `sure` enough of them.
int draft(const Drafter& d, const Stack& stack, const float* hidden, const float* const* aux, int64_t newest,
          int64_t steps, const DraftSampling* sampling, const DraftChances& sure, int64_t* tokens, int64_t* made,
          int threads) {
  const int64_t width = d.pre.columns() / 2;  // the backbone's
  Arena sizes;
  sizes.take<float>(2 * width);
  sizes.take<float>(d.head.outputs);
  sizes.take<int64_t>(d.head.outputs);
  sizes.take<int64_t>(d.head.outputs);
  sizes.take<float>(d.aux * width);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return 1;
  Arena arena(scratch.data);
  float* joined = arena.take<float>(2 * width);  // [embedding ; state]
  float* scores = arena.take<float>(d.head.outputs);
  int64_t* found = arena.take<int64_t>(d.head.outputs);
  int64_t* kept = arena.take<int64_t>(d.head.outputs);
  float* others = arena.take<float>(d.aux * width);
  std::memcpy(joined + width, hidden, sizeof(float) * width);
  if (d.aux) {
    for (int64_t i = 0; i < d.aux; ++i)  // `joined` has room for the norm's scratch, and its first half is free
      chosen->norm(aux[i], nullptr, width, d.eps, others + i * width, joined);
    const Product fused{&d.fuse, joined};
    if (!multiply_row(others, d.aux * width, &fused, 1, threads)) return 1;
    chosen->add_row(joined, width, joined + width);
  }
  double reach = 1;
  *made = 0;
  for (int64_t step = 0; step < steps; ++step) {
    if (newest < 0 || newest >= d.tokens) return 3;
    chosen->unpack_row(d.embedding, newest, joined);
    if (d.embed_scale != 1) chosen->scale_row(d.embed_scale, width, joined);
    const Product pre{&d.pre, stack.x};
    if (!multiply_row(joined, 2 * width, &pre, 1, threads)) return 1;
    Stack layers = stack;
    if (const int code = layers.run(threads)) return code;
    const Product last[2] = {{&d.head, scores}, {&d.post, joined + width}};
    if (!multiply_row(stack.x, stack.hidden, last, step + 1 < steps ? 2 : 1, threads)) return 1;
    const int64_t* ids = d.ids;
    int64_t count = d.head.outputs;
    if (sampling) chosen->scale_row(sampling->sharpness, count, scores);
    const float factor = sampling ? sure.sharpness / sampling->sharpness : sure.sharpness;  // sampled: the temperature
    float top = 0;
    int64_t best = chosen->best_of(scores, count, &top);
    float share = chosen->top_share(scores, count, factor, top);
    double chance = share;
    if (sampling) {
      if (sampling->top_k > 0 || sampling->top_p < 1 || sampling->min_p > 0) {
        const int64_t some = truncate(scores, d.ids, count, *sampling, found, kept);
        if (some) count = some, ids = kept;  // none where the best is no number
      }
      best = chosen->gumbel_argmax(scores, ids, count, sampling->keys[step], found);
      share = float(share * std::exp(double(factor) * (double(scores[best]) - top)));
      chance = chance_with_noise(share, ids ? ids[best] : best, sampling->keys[step], factor);
    }
    newest = tokens[step] = ids ? ids[best] : best;
    sure.shares[step] = share;
    reach *= chance;
    ++*made;
    if (reach < sure.floors[step]) break;  // a chance that is no number ends nothing
  }
  return 0;
}

}  // namespace
