// Included before the kernels (g++ -include), this makes a library that has the set avx-vnni on any CPU with AVX2: the
// CPU is said to have the one instruction that the set adds, and the instruction is done by others. What is wrong
// around the instruction is then wrong here too. Left out: the instruction itself.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// vpdpbusd, as Intel describes it: to each of eight sums the products of four unsigned bytes and four signed ones.
__attribute__((target("avx2"))) inline __m256i pretended_dpbusd(__m256i sums, __m256i unsigned_bytes,
                                                                __m256i signed_bytes) {
  int32_t sum[8];
  uint8_t a[32];
  int8_t b[32];
  std::memcpy(sum, &sums, 32);
  std::memcpy(a, &unsigned_bytes, 32);
  std::memcpy(b, &signed_bytes, 32);
  for (int i = 0; i < 32; ++i) sum[i / 4] += int32_t(a[i]) * b[i];
  std::memcpy(&sums, sum, 32);
  return sums;
}

inline int pretended_cpuid(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  const int known = __get_cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0 && *a == 0) *a = 1;  // the number of the last part
  if (leaf == 7 && part == 1) *a |= 1u << 4;
  return known;
}

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 pretended_dpbusd
#define __get_cpuid_count pretended_cpuid
