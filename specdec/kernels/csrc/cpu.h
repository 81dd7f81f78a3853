// What this CPU has beyond what every CPU of its kind has, and the system lets programs use.

#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/types.h>  // which the next one needs

#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long feature);  // windows.h has more
#endif

namespace {

struct CPU {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false;  // AVX2 with half floats; AVX-512 F, DQ, BW, VL and VNNI
  bool dotprod = false, i8mm = false;  // NEON's sums of four products; those, and products of small matrices
};

// Asked of the CPU directly: what __builtin_cpu_supports answers depends on the compiler's runtime library.
inline CPU this_cpu() {
  CPU cpu;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0, state = 0, rest = 0, leaves = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool f16c = c & 1u << 29, system_saves = c & 1u << 27;
  if (!f16c || !system_saves || !__get_cpuid_count(7, 0, &leaves, &b, &c, &d)) return cpu;
  __asm__ volatile("xgetbv" : "=a"(state), "=d"(rest) : "c"(0));
  cpu.avx2 = b & 1u << 5 && (state & 0x6) == 0x6;
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  cpu.avx512_vnni = cpu.avx2 && (b & wanted) == wanted && c & 1u << 11 && (state & 0xe6) == 0xe6;
  cpu.avx_vnni = cpu.avx2 && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
#elif defined(__aarch64__) && defined(__linux__)
  cpu.dotprod = getauxval(AT_HWCAP) & 1ul << 20;                // HWCAP_ASIMDDP, which old headers lack
  cpu.i8mm = cpu.dotprod && getauxval(AT_HWCAP2) & 1ul << 13;  // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
  const auto has = [](const char* feature) {
    int found = 0;
    size_t size = sizeof(found);
    return !sysctlbyname(feature, &found, &size, nullptr, 0) && found;
  };
  cpu.dotprod = has("hw.optional.arm.FEAT_DotProd");
  cpu.i8mm = cpu.dotprod && has("hw.optional.arm.FEAT_I8MM");
#elif defined(__aarch64__) && defined(_WIN32)
  cpu.dotprod = IsProcessorFeaturePresent(43);              // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  cpu.i8mm = cpu.dotprod && IsProcessorFeaturePresent(66);  // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
#endif
  return cpu;
}

}  // namespace
