// The records that Python fills in: where things are, and how many. abi.py has each of them with the same names in the
// same order.

#pragma once

#include <cstddef>
#include <cstdint>

namespace {

// A packed matrix (blocks.py); `blocks` is K / 32. Null: no minimum, no scales of sixteen inputs, no table of 16 values.
// `unit`: what scales are multiplied by.
struct Weights {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* minimum;
  const uint8_t* sub;
  const int8_t* table;
  int64_t blocks;
  int64_t bits;
  double unit;
};

// A packed matrix [outputs, columns] and its bias [outputs] or null.
struct Matrix {
  Weights w;
  const float* bias;
  int64_t outputs;

  bool present() const { return w.q != nullptr; }
  int64_t columns() const { return 32 * w.blocks; }
  int64_t groups() const { return (outputs + 15) / 16; }
};

// A low-rank part of a matrix [outputs, columns], which adds up * (scale * (down * x)): low_rank.py has the layout of
// `down` and `up`, of float32 where `wide`, else of bfloat16. `rank`: a multiple of four; 0: there is none.
struct LowRank {
  const void* down;
  const void* up;
  int64_t rank, wide;
  float scale;
};

// The low-rank parts of one decoder layer's matrices, by the matrices' names in Layer.
struct LayerAdapter {
  LowRank q, k, v, o, gate, up, down, ple_gate, ple_projection;
};

// Keys or values of one layer: `head` and `slot` are strides in elements; `scale` [heads, slots] with int8.
enum StoreType { kFloat32, kBfloat16, kInt8 };
struct Plane {
  const void* data;
  const float* scale;
  int64_t head, slot;
};

// One layer's store. Without keys they are rebuilt: rope(values * weight), with `cos` and `sin` [positions, pairs]: the
// first `pairs` pairs of a head turn, the others stay.
struct KV {
  Plane keys, values;
  const float* weight;
  const float* cos;
  const float* sin;
  int64_t type, slots, width, value_width, pairs;
};

// The mixture of experts beside a layer's MLP. `gate_up` [count * 2 * width, hidden] has of each expert the rows of
// gate, then those of up; `down` is [count * hidden, width]; of `router` only `down` is read, whose first `count` ranks
// are scores. Each row takes `used` experts. `use` is called with the number of the layer and the experts that a pass
// reads next, ascending; it is null where all experts are in memory.
using UseExperts = void (*)(int64_t layer, const int64_t* experts, int64_t count);
struct Mixture {
  Weights gate_up, down;
  LowRank router;
  const float* router_scale;
  const float* expert_scale;
  const float* dense_norm;
  const float* pre_norm;
  const float* post_norm;
  int64_t count, used, width, layer;
  UseExperts use;
};

// One decoder layer: `LayerWeights` of layers.py says what each field does. A matrix or vector that it lacks is null.
enum Activation { kSilu, kGeluTanh };
struct Layer {
  Matrix q, k, v, o, gate, up, down, ple_gate, ple_projection;
  const float* input_norm;
  const float* q_norm;
  const float* k_norm;
  const float* attention_post_norm;
  const float* mlp_norm;
  const float* mlp_post_norm;
  const float* ple_norm;
  const float* scalar;  // one float
  int64_t heads, kv_heads, head_dim, kind, store, activation, norm_values;
  float eps, scale;
  const Mixture* experts;
};

// One kind of layer's rotations [rows, head_dim], and what its rows see: positions first[t] .. end[t] - 1, which may be
// later ones than a row's own.
struct Span {
  const float* cos;
  const float* sin;
  const int64_t* first;
  const int64_t* end;
};

// What a call does of its layers: all of it; K and V of the rows alone; or the rest, where K and V are stored already.
enum Work { kAll, kKeys, kRest };

// The parts of a head around its layers. `ids` [head.outputs]: the tokens of its rows; null: their own numbers. `fuse`:
// what the states of `aux` other layers, each of norm one, add to the backbone's.
struct Drafter {
  Matrix pre, post, head, fuse;
  Weights embedding;  // the backbone's
  int64_t tokens;     // rows of it
  const int64_t* ids;
  float embed_scale, eps;
  int64_t aux;
};

// How the tokens of a draft are sampled: the key of each position's noise, and what is done to logits before: `Noise`
// and `Warping` of specdec/engine/sampling.py.
struct DraftSampling {
  const uint64_t* keys;
  float sharpness;
  int64_t top_k;  // 0: all
  double top_p, min_p;
};

// How sure a head is of its draft. `shares` [steps] gets the probability that it gives each token, of its logits times
// `sharpness`, without temperature and noise. The draft ends after the first token where the product of the chances so
// far, which are the shares, or with noise chance_with_noise, is below floors[i] [steps].
struct DraftChances {
  float* shares;
  const float* floors;
  float sharpness;
};

}  // namespace
