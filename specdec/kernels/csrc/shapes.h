// What the kernels pass to each other: rows of activations, rows over a store, and how much is done at once. The
// same for every instruction set.

#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace {

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Up to kTile quantised activation rows, interleaved block by block; `term` is per kind of weights.
enum Kind { kMinimum, kBy8, kBy16, kBy128, kHalves, kKinds };
constexpr int64_t kTile = 8;
struct Tile {
  int8_t* values;
  float* scale;
  float* term[kKinds];
  int rows;
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
  int64_t low = 0, high = 0, span = 0;
  float* scores = nullptr;
  float* over = nullptr;
};
constexpr int64_t kRanks = 4;        // ranks of a low-rank part whose sums are made at once
constexpr int64_t kPositions = 64;  // slots whose keys are expanded at once
constexpr int64_t kColumns = 64;    // columns of values that are summed at once, at the most: a cache line of int8
constexpr int64_t kSpread = 2048;   // values that are expanded at once: a part of the first-level cache

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
