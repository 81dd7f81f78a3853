// Products of blocks whose codes are places in a table, and of blocks with a scale for each sixteen inputs: what
// product.inl calls for a `Form` that is `coded`. Each instruction set has `add_coded` in a file of its own.
//
// Inputs 0 to 15 of a block are its chunks 0 to 3, and low nibbles; the others are chunks 4 to 7, and high ones: a half
// of a block and the half of its bytes are the same thing. The integers of a half are multiplied by its scale and added,
// and the rest is as it is without such scales. `kHalves` has the sums of a row's values, by which `Form::zero` is taken
// back again.

// The code of byte `byte` of chunk `chunk` of a block with `bits` bits.
INLINE int code_at(const uint8_t* q, int bits, int chunk, int byte) {
  if (bits == 8) return q[64 * chunk + byte];
  int code = 0, shift = 0;
  if (bits >= 4) {
    code = q[64 * (chunk % 4) + byte] >> (chunk / 4 * 4) & 15;
    shift = 4, q += 256;
  }
  if (bits == 2 || bits == 3 || bits == 6) {
    code |= (q[64 * (chunk / 4) + byte] >> (2 * (chunk % 4)) & 3) << shift;
    shift += 2, q += 128;
  }
  if (bits % 2) code |= (q[8 * chunk + byte / 8] >> byte % 8 & 1) << shift;
  return code;
}

#if KERNEL_IS_NEON
#include "coded_neon.inl"
#elif KERNEL_LANES == 8
#include "coded_256.inl"
#if KERNEL_ISA == ISA_AVX2
#include "coded_avx2.inl"
#else
#include "coded_vnni.inl"
#endif
#elif KERNEL_ISA == ISA_AVX512
#include "coded_512.inl"
#else
#include "coded_portable.inl"
#endif
