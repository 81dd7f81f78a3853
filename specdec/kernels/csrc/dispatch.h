// The arithmetic once per instruction set, and which of them runs: `chosen`.
//
// isa/ holds the arithmetic. It is included below inside one namespace per set, under the compiler's pragma for that
// set, so that one binary holds all of them and asks the CPU which it has. What is compiled there may run only where
// that CPU is: nothing else, and nothing of the standard library that is more than a line, belongs into isa/.
//
// Each set has a value of KERNEL_ISA, by which isa/ tells them apart.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu.h"
#include "shapes.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Between these two, functions are compiled for a CPU that has `features`.
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) \
  PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define ISA_PORTABLE 0
#define ISA_NEON 1
#define ISA_NEON_I8MM 2
#define ISA_AVX2 3
#define ISA_AVX_VNNI 4
#define ISA_AVX512 5
#define KERNEL_IS_NEON (KERNEL_ISA == ISA_NEON || KERNEL_ISA == ISA_NEON_I8MM)

#define KERNEL_ISA ISA_PORTABLE
namespace portable {
#include "isa/all.inl"
}  // namespace portable
#undef KERNEL_ISA

#if defined(__x86_64__)

BEGIN_TARGET("avx2,f16c")
#define KERNEL_ISA ISA_AVX2
namespace avx2 {
#include "isa/all.inl"
}  // namespace avx2
#undef KERNEL_ISA
END_TARGET

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_AVX_VNNI  // older compilers do not know it
BEGIN_TARGET("avx2,f16c,avxvnni")
#define KERNEL_ISA ISA_AVX_VNNI
namespace avx_vnni {
#include "isa/all.inl"
}  // namespace avx_vnni
#undef KERNEL_ISA
END_TARGET
#endif

BEGIN_TARGET("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define KERNEL_ISA ISA_AVX512
namespace avx512 {
#include "isa/all.inl"
}  // namespace avx512
#undef KERNEL_ISA
END_TARGET

#elif defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#define HAS_NEON_DOTPROD  // an older clang has these instructions only where all of the code may use them

#if defined(__clang__)
BEGIN_TARGET("dotprod")
#else
BEGIN_TARGET("arch=armv8.2-a+dotprod")
#endif
#define KERNEL_ISA ISA_NEON
namespace neon {
#include "isa/all.inl"
}  // namespace neon
#undef KERNEL_ISA
END_TARGET

#if defined(__clang__) ? __clang_major__ >= 16 || defined(__ARM_FEATURE_MATMUL_INT8) : __GNUC__ >= 10
#define HAS_NEON_I8MM
#if defined(__clang__)
BEGIN_TARGET("dotprod,i8mm")
#else
BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm")
#endif
#define KERNEL_ISA ISA_NEON_I8MM
namespace neon_i8mm {
#include "isa/all.inl"
}  // namespace neon_i8mm
#undef KERNEL_ISA
END_TARGET
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
  decltype(&portable::divide_row) divide_row;
  decltype(&portable::piece_peaks) piece_peaks;
  decltype(&portable::unpack_row) unpack_row;
  decltype(&portable::descend) descend;
  decltype(&portable::ascend) ascend;
  decltype(&portable::best_of) best_of;
  decltype(&portable::gumbel_candidates) gumbel_candidates;
  decltype(&portable::gumbel_argmax) gumbel_argmax;
  decltype(&portable::top_share) top_share;
};

#define KERNELS_OF(isa)                                                                              \
  {isa::quantise_row, isa::multiply, isa::score, isa::softmax_row, isa::weighted_values, isa::norm,  \
   isa::rope_row, isa::gate_row, isa::add_row, isa::scale_row, isa::divide_row, isa::piece_peaks,    \
   isa::unpack_row, isa::descend, isa::ascend, isa::best_of, isa::gumbel_candidates,                  \
   isa::gumbel_argmax, isa::top_share}

// `needs`: what the CPU must have; null: any CPU.
struct InstructionSet {
  const char* name;
  bool CPU::*needs;
  Kernels kernels;
};

// The best last.
const InstructionSet kSets[] = {
    {"portable", nullptr, KERNELS_OF(portable)},
#if defined(__x86_64__)
    {"avx2", &CPU::avx2, KERNELS_OF(avx2)},
#if defined(HAS_AVX_VNNI)
    {"avx-vnni", &CPU::avx_vnni, KERNELS_OF(avx_vnni)},
#endif
    {"avx512-vnni", &CPU::avx512_vnni, KERNELS_OF(avx512)},
#elif defined(HAS_NEON_DOTPROD)
    {"neon-dotprod", &CPU::dotprod, KERNELS_OF(neon)},
#if defined(HAS_NEON_I8MM)
    {"neon-i8mm", &CPU::i8mm, KERNELS_OF(neon_i8mm)},
#endif
#endif
};

// The index-th of those that this CPU runs; null: it runs no more.
const InstructionSet* usable_set(int index) {
  static const CPU cpu = this_cpu();
  for (const InstructionSet& set : kSets)
    if ((!set.needs || cpu.*set.needs) && !index--) return &set;
  return nullptr;
}

const Kernels* best_kernels() {
  const Kernels* best = nullptr;
  for (int i = 0; const InstructionSet* set = usable_set(i); ++i) best = &set->kernels;
  return best;
}

const Kernels* chosen = best_kernels();

}  // namespace
