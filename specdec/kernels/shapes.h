// What the kernels pass to each other: matrices, rows, stores and how much is done at once. Included once, by native.cpp,
// before any instruction set: these are the same for all of them.

namespace {

// A packed matrix (blocks.py); `blocks` is K / 32.
struct Weights {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* minimum;
  int64_t blocks;
  int64_t bits;
};

// Up to kTile quantised activation rows, interleaved block by block; `term` is per kind of weights.
enum Kind { kMinimum, kBy8, kBy16, kBy128, kKinds };
constexpr int64_t kTile = 8;
struct Tile {
  int8_t* values;
  float* scale;
  float* term[kKinds];
  int rows;
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

// Rows of one sequence over its store. Row t sees positions first[t] .. end[t] - 1; all lie in low .. high - 1.
// `scores` [rows, heads, span], `over` [rows, heads].
struct Attention {
  const float* q;
  float* y;
  const KV* store;
  const int64_t* first;
  const int64_t* end;
  int64_t rows, heads, kv_heads;
  float scale;
  int64_t low, high, span;
  float* scores;
  float* over;
};
constexpr int64_t kPositions = 64;  // slots expanded at once
constexpr int64_t kColumns = 32;    // columns that one thread sums

// IEEE half to float, for CPUs (and compilers) without an instruction for it.
[[maybe_unused]] inline float half_value(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  uint32_t whole;
  float value;
  if (magnitude >= 0x7c00) {
    whole = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else {
    // a half's bits, shifted, are the float scaled by 2^-112; the product undoes that, for subnormals too
    whole = magnitude << 13;
    std::memcpy(&value, &whole, 4);
    value *= 0x1p112f;
    std::memcpy(&whole, &value, 4);
  }
  whole |= sign;
  std::memcpy(&value, &whole, 4);
  return value;
}

}  // namespace
