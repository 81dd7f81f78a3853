// The arithmetic once per instruction set, and which of them runs: `chosen`.
//
// isa/ holds the arithmetic. It is included below inside one namespace per set, under the compiler's pragma for that
// set, so that one binary holds all of them and asks the CPU which it has. What is compiled there may run only where
// that CPU is: nothing else, and nothing of the standard library that is more than a line, belongs into isa/.
//
// Left out: NEON (the portable code is plain C++ that compilers vectorise).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "shapes.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#define KERNEL_ISA 0
namespace portable {
#include "isa/all.inl"
}  // namespace portable
#undef KERNEL_ISA

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define KERNEL_ISA 2
namespace avx2 {
#include "isa/all.inl"
}  // namespace avx2
#undef KERNEL_ISA
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
#include "isa/all.inl"
}  // namespace avx512
#undef KERNEL_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Kernels {
  decltype(&portable::quantise_row) quantise_row;
  decltype(&portable::multiply) multiply;
  decltype(&portable::score) score;
  decltype(&portable::softmax_row) softmax_row;
  decltype(&portable::weighted_values) weighted_values;
  decltype(&portable::norm) norm;
  decltype(&portable::rope_row) rope_row;
  decltype(&portable::gate_row) gate_row;
  decltype(&portable::add_row) add_row;
  decltype(&portable::scale_row) scale_row;
  decltype(&portable::unpack_row) unpack_row;
  decltype(&portable::best_of) best_of;
  decltype(&portable::gumbel_candidates) gumbel_candidates;
  decltype(&portable::gumbel_argmax) gumbel_argmax;
};

#define KERNELS_OF(isa)                                                                              \
  {isa::quantise_row, isa::multiply, isa::score, isa::softmax_row, isa::weighted_values, isa::norm,  \
   isa::rope_row, isa::gate_row, isa::add_row, isa::scale_row, isa::unpack_row, isa::best_of,        \
   isa::gumbel_candidates, isa::gumbel_argmax}
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

}  // namespace
