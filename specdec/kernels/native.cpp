// The native kernels: a plain C interface over raw pointers, no torch headers, so that it compiles in seconds and
// does not depend on torch's version. Loaded by native.py through ctypes.
//
// One binary holds every instruction set and asks the CPU which it has. This file is the interface: shapes,
// addresses, and how work is cut into pieces (threads.h says who does them). The arithmetic is in product.h and
// rows.h, on the sixteen floats of simd.h.
//
// Left out: NEON (the portable code is plain C++ that compilers vectorise).

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "threads.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

// A packed matrix (blocks.py); `blocks` is K / 32.
struct Weights {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* minimum;
  int64_t blocks;
  int bits;
};

// Up to eight quantised activation rows, interleaved block by block.
struct Tile {
  int8_t* values;
  float* scale;
  float* term;
};

// One head's slots of keys or values: `width` floats each, `stride` floats apart.
struct Store {
  const float* data;
  int64_t stride, width;
};

// The slots of consecutive positions: a run, and a second one from slot 0 where the ring wraps.
struct Ring {
  int64_t start[2];
  int64_t count[2];
};

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

#define KERNEL_ISA 0
namespace portable {
#include "simd.h"
#include "product.h"
#include "rows.h"
}  // namespace portable
#undef KERNEL_ISA
#undef EACH

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define KERNEL_ISA 2
namespace avx2 {
#include "simd.h"
#include "product.h"
#include "rows.h"
}  // namespace avx2
#undef KERNEL_ISA
#undef EACH
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define KERNEL_ISA 5
namespace avx512 {
#include "simd.h"
#include "product.h"
#include "rows.h"
}  // namespace avx512
#undef KERNEL_ISA
#undef EACH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Kernels {
  decltype(&portable::quantise_tile) quantise_tile;
  decltype(&portable::multiply) multiply;
  decltype(&portable::attend) attend;
  decltype(&portable::norm) norm;
  decltype(&portable::turn) turn;
  decltype(&portable::gate_row) gate_row;
};

#define KERNELS_OF(isa) {isa::quantise_tile, isa::multiply, isa::attend, isa::norm, isa::turn, isa::gate_row}
const Kernels kSets[] = {
    KERNELS_OF(portable),
#if defined(__x86_64__)
    KERNELS_OF(avx2),
    KERNELS_OF(avx512),
#endif
};

// Asked of the CPU directly: what __builtin_cpu_supports answers depends on the compiler's runtime library.
int best_set() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0, state = 0, rest = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool f16c = c & 1u << 29, system_saves = c & 1u << 27;
  if (!f16c || !system_saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  __asm__ volatile("xgetbv" : "=a"(state), "=d"(rest) : "c"(0));
  const bool avx2 = b & 1u << 5 && (state & 0x6) == 0x6;
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const bool vnni = (b & wanted) == wanted && c & 1u << 11 && (state & 0xe6) == 0xe6;
  return !avx2 ? 0 : vnni ? 2 : 1;
#else
  return 0;
#endif
}

const int kBest = best_set();
const Kernels* chosen = &kSets[kBest];

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

// 0 portable, 1 AVX2, 2 AVX-512 VNNI: the best that this CPU runs.
API int specdec_best_set() { return kBest; }

// Use a set from now on; returns the one that is used (never more than the CPU has).
API int specdec_use_set(int set) {
  chosen = &kSets[set < 0 || set > kBest ? kBest : set];
  return int(chosen - kSets);
}

API int specdec_has_threads() { return kParallel != nullptr; }

// y [rows, outputs] = x [rows, columns] times packed weights [outputs, columns]. 1 when out of memory.
API int specdec_block_linear(const float* x, const uint8_t* q, const uint16_t* scale, const uint16_t* minimum,
                             float* y, int64_t rows, int64_t columns, int64_t outputs, int bits, int threads) {
  constexpr int64_t kTile = 8, kRows = 128;  // rows in registers; rows whose activations stay in cache
  const Kernels& kernels = *chosen;
  const int64_t blocks = columns / 32, groups = (outputs + 15) / 16;
  const Weights w{q, scale, minimum, blocks, bits};
  const int offset = minimum ? 0 : bits == 4 ? 8 : 128;
  const size_t padded = (size_t(smaller(rows, kRows) * blocks) * 4 + 63) & ~size_t(63);
  const Scratch scratch(size_t(smaller(rows, kRows)) * columns + 2 * padded);
  if (!scratch.data) return 1;
  float* scales = reinterpret_cast<float*>(scratch.data);
  float* terms = reinterpret_cast<float*>(scratch.data + padded);
  int8_t* values = reinterpret_cast<int8_t*>(scratch.data + 2 * padded);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = smaller(kRows, rows - first), tiles = (count + kTile - 1) / kTile;
    const auto tile_at = [&](int64_t i) {
      return Tile{values + i * kTile * columns, scales + i * kTile * blocks, terms + i * kTile * blocks};
    };
    const auto rows_of = [&](int64_t i) { return int(smaller(kTile, count - i * kTile)); };
    spread(tiles, 1, double(count) * columns, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.quantise_tile(x + (first + i * kTile) * columns, columns, rows_of(i), tile_at(i), offset);
    });
    const int64_t step = larger(1, groups / (8 * larger(1, threads)));
    const double cost = double(outputs) * columns * (0.5 + 0.25 * count);
    spread(groups, step, cost, threads, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        for (int64_t i = 0; i < tiles; ++i)
          kernels.multiply(w, g, rows_of(i), tile_at(i), y + (first + i * kTile) * outputs + g * 16, outputs,
                           int(smaller(16, outputs - g * 16)));
    });
  }
  return 0;
}

// reference.py's attention. `strides` are, in floats, those of k's and v's heads and slots (k head, k slot, v head,
// v slot). 1 when out of memory, 2 when a row sees more positions than there are slots.
API int specdec_attention(const float* q, const float* k, const float* v, const int64_t* strides, const int64_t* lo,
                          const int64_t* hi, float scale, float* y, int64_t rows, int64_t heads, int64_t kv_heads,
                          int64_t width, int64_t value_width, int64_t slots, int threads) {
  const Kernels& kernels = *chosen;
  const int64_t group = heads / kv_heads;
  int64_t longest = 1;
  double total = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t length = larger(0, hi[t] - lo[t]);
    if (length > slots || (length && lo[t] < 0)) return 2;
    longest = larger(longest, length);
    total += double(length);
  }
  // few rows: query heads one by one, so that every thread has some; many: a key head's queries share its keys
  const int64_t unit = rows * kv_heads >= 4 * threads ? group : 1;
  const int64_t units = heads / unit;
  std::atomic<int> failed{0};
  spread(rows * units, 1, total * heads * (width + value_width), threads, [&](int64_t begin, int64_t end) {
    const Scratch scratch(sizeof(float) * size_t(longest * unit));
    if (!scratch.data) {
      failed = 1;
      return;
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / units, head = item % units * unit, kv = head / group;
      const int64_t length = larger(0, hi[t] - lo[t]), start = length ? lo[t] % slots : 0;
      const int64_t before = smaller(length, slots - start);
      const Ring ring{{start, 0}, {before, length - before}};
      const Store keys{k + kv * strides[0], strides[1], width}, values{v + kv * strides[2], strides[3], value_width};
      kernels.attend(q + (t * heads + head) * width, keys, values, ring, unit, scale,
                     y + (t * heads + head) * value_width, reinterpret_cast<float*>(scratch.data));
    }
  });
  return failed;
}

// x [rows, width] to y; weight [width] or null. 1 when out of memory.
API int specdec_rms_norm(const float* x, const float* weight, float eps, float* y, int64_t rows, int64_t width,
                         int threads) {
  const Kernels& kernels = *chosen;
  std::atomic<int> failed{0};
  spread(rows, larger(1, 16384 / width), double(rows) * width, threads, [&](int64_t begin, int64_t end) {
    const Scratch scratch(sizeof(float) * size_t(width + 16));
    if (!scratch.data) {
      failed = 1;
      return;
    }
    for (int64_t r = begin; r < end; ++r)
      kernels.norm(x + r * width, weight, width, eps, y + r * width, reinterpret_cast<float*>(scratch.data));
  });
  return failed;
}

// x [rows, heads, width]; cos and sin [rows, width].
API int specdec_rope(const float* x, const float* cos, const float* sin, float* y, int64_t rows, int64_t heads,
                     int64_t width, int threads) {
  const Kernels& kernels = *chosen;
  const int64_t row = heads * width;
  spread(rows, larger(1, 16384 / row), double(rows) * row, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels.turn(x + t * row, cos + t * width, sin + t * width, heads, width, y + t * row);
  });
  return 0;
}

// gate and up [rows, width].
API int specdec_gated(const float* gate, const float* up, int gelu, float* y, int64_t rows, int64_t width,
                      int threads) {
  const Kernels& kernels = *chosen;
  spread(rows, larger(1, 8192 / width), double(rows) * width * 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels.gate_row(gate + r * width, up + r * width, width, gelu != 0, y + r * width);
  });
  return 0;
}
