// One block of the product on NEON: sixteen outputs against T rows of activations, with the instruction that adds four
// products of bytes to each of four sums; with i8mm, two rows and more have another (product_i8mm.inl). product.inl has
// the loop over blocks. Eight outputs go at a time where there are several rows: the sums of eight rows then fill half
// of the registers. Weights go as signed bytes; what is taken from them for that, the integers make good that the sums
// start from.

// Sixteen weights, a signed byte each: with 4 bits as they are, with 5 and 8 less 16 and 128. HALF: which nibble of
// `raw`. The fifth bit of weight i is clear where fifths[i] & bit[i] is 0.
template <int BITS, int HALF>
INLINE int8x16_t signed_bytes(uint8x16_t raw, uint8x16_t fifths, uint64x2_t bit) {
  if (BITS == 8) return vreinterpretq_s8_u8(veorq_u8(raw, vdupq_n_u8(128)));
  if (BITS == 4) return vreinterpretq_s8_u8(HALF ? vshrq_n_u8(raw, 4) : vandq_u8(raw, vdupq_n_u8(15)));
  const uint8x16_t clear = vceqzq_u8(vandq_u8(fifths, vreinterpretq_u8_u64(bit)));
  // a nibble with ones above it, where the fifth bit is clear, is less by sixteen
  return vreinterpretq_s8_u8(HALF ? vsriq_n_u8(clear, raw, 4) : vsliq_n_u8(raw, clear, 4));
}

// The nibbles or bytes of vector v of chunk 4 * HALF + j: of outputs 4v .. 4v + 3.
template <int BITS, int HALF>
INLINE uint8x16_t raw_of(const uint8_t* q, int j, int v) {
  return vld1q_u8(q + 64 * (BITS == 8 ? 4 * HALF + j : j) + 16 * v);
}

// Those weights. `fifths`: the chunk's fifth bits.
template <int BITS, int HALF>
INLINE int8x16_t weights_of(const uint8_t* q, uint64_t fifths, int j, int v) {
  const uint8x16_t eight_each = vcombine_u8(vdup_n_u8(uint8_t(2 * v)), vdup_n_u8(uint8_t(2 * v + 1)));
  const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u64(vdupq_n_u64(fifths)), eight_each);
  return signed_bytes<BITS, HALF>(raw_of<BITS, HALF>(q, j, v), bytes, vdupq_n_u64(0x8040201008040201));
}

// Adds the products of chunk 4 * HALF + J: `a` has half of each row's block, a chunk to a lane.
template <int BITS, int HALF, int J, int T, int V>
INLINE void add_chunk(const uint8_t* q, int first, const int8x16_t (&a)[T], int32x4_t (&dot)[T][V]) {
  uint64_t fifths = 0;
  if (BITS == 5) std::memcpy(&fifths, q + 256 + 8 * (4 * HALF + J), 8);
  for (int v = 0; v < V; ++v) {
    const int8x16_t weights = weights_of<BITS, HALF>(q, fifths, J, first + v);
    for (int t = 0; t < T; ++t) dot[t][v] = vdotq_laneq_s32(dot[t][v], weights, a[t], J);
  }
}

template <int HALF, int T>
INLINE void load_half(const int8_t* x, int8x16_t (&a)[T]) {
  for (int t = 0; t < T; ++t) a[t] = vld1q_s8(x + 32 * t + 16 * HALF);
}

// Adds the products of vectors first .. first + V - 1, of four outputs each.
template <int BITS, int T, int V>
INLINE void add_dots(const uint8_t* q, const int8_t* x, int first, int32x4_t (&dot)[T][V]) {
  int8x16_t a[T], b[T];
  __asm__("" : "+r"(x));  // else activations would be kept for the other eight outputs, on the stack
  load_half<0>(x, a);
  if (T <= 6) {
    load_half<1>(x, b);
    add_chunk<BITS, 0, 0>(q, first, a, dot), add_chunk<BITS, 1, 0>(q, first, b, dot);
    add_chunk<BITS, 0, 1>(q, first, a, dot), add_chunk<BITS, 1, 1>(q, first, b, dot);
    add_chunk<BITS, 0, 2>(q, first, a, dot), add_chunk<BITS, 1, 2>(q, first, b, dot);
    add_chunk<BITS, 0, 3>(q, first, a, dot), add_chunk<BITS, 1, 3>(q, first, b, dot);
    return;
  }
  // one half after the other: there are no registers for both
  add_chunk<BITS, 0, 0>(q, first, a, dot), add_chunk<BITS, 0, 1>(q, first, a, dot);
  add_chunk<BITS, 0, 2>(q, first, a, dot), add_chunk<BITS, 0, 3>(q, first, a, dot);
  __asm__("" : "+r"(q), "+r"(x));  // else weights of the first half would be kept for the second, on the stack
  load_half<1>(x, b);
  add_chunk<BITS, 1, 0>(q, first, b, dot), add_chunk<BITS, 1, 1>(q, first, b, dot);
  add_chunk<BITS, 1, 2>(q, first, b, dot), add_chunk<BITS, 1, 3>(q, first, b, dot);
}

#if KERNEL_ISA == ISA_NEON_I8MM
#include "product_i8mm.inl"
#endif

INLINE VF halves_at(const uint16_t* x) { return (VF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }

template <int T, int BITS, bool MINIMUM>
INLINE void add_block(const Block& block, F (&total)[T]) {
  constexpr int kVectors = T == 1 ? 4 : 2;
  for (int first = 0; first < 4; first += kVectors) {
    int32x4_t dot[T][kVectors];
    for (int t = 0; t < T; ++t) {
      int32_t start = 0;
      if (BITS == (MINIMUM ? 5 : 4)) std::memcpy(&start, block.start + t, 4);
      for (int v = 0; v < kVectors; ++v) dot[t][v] = vdupq_n_s32(MINIMUM ? -start : start);
    }
#if KERNEL_ISA == ISA_NEON_I8MM
    if constexpr (T > 1)
      add_paired_dots<BITS>(block.q, block.x, first, dot);
    else
#endif
      add_dots<BITS>(block.q, block.x, first, dot);
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + v;
      const VF d = halves_at(block.scale + 4 * at);
      VF m;
      if (MINIMUM) m = halves_at(block.minimum + 4 * at);
      for (int t = 0; t < T; ++t) {
        VF part = d * block.activation_scale[t] * (VF)vcvtq_f32_s32(dot[t][v]);
        if (MINIMUM) part += m * block.term[t];
        total[t].p[at] += part;
      }
    }
  }
}
