// A whole draft in one call: what drafter/propose.py does step by step, to the same bits.

#pragma once

namespace {

// The parts of a head around its layers. `ids` [head.outputs]: the tokens of its rows; null: their own numbers.
struct Drafter {
  Matrix pre, post, head;
  Weights embedding;  // the backbone's
  int64_t tokens;     // rows of it
  const int64_t* ids;
  float embed_scale;
};

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

// `steps` tokens after `newest`, whose choice came from the backbone's state `hidden`. `stack` is set up for one row.
// 1 when out of memory, 2 when the row sees more positions than a store has slots, 3 for an id that is no row.
// With `keys` [steps] each token is the one whose logit times `sharpness` wins with the noise of its position.
int draft(const Drafter& d, const Stack& stack, const float* hidden, int64_t newest, int64_t steps,
          const uint64_t* keys, float sharpness, int64_t* tokens, int threads) {
  const int64_t width = d.pre.columns() / 2;  // the backbone's
  Arena sizes;
  sizes.take<float>(2 * width);
  sizes.take<float>(d.head.outputs);
  sizes.take<int64_t>(d.head.outputs);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return 1;
  Arena arena(scratch.data);
  float* joined = arena.take<float>(2 * width);  // [embedding ; state]
  float* scores = arena.take<float>(d.head.outputs);
  int64_t* found = arena.take<int64_t>(d.head.outputs);
  std::memcpy(joined + width, hidden, sizeof(float) * width);
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
    int64_t best;
    if (keys) {
      chosen->scale_row(sharpness, d.head.outputs, scores);
      best = chosen->luckiest(scores, d.ids, d.head.outputs, keys[step], found);
    } else {
      float top = 0;
      best = chosen->best_of(scores, d.head.outputs, &top);
    }
    newest = tokens[step] = d.ids ? d.ids[best] : best;
  }
  return 0;
}

}  // namespace
