// coded.inl on NEON: weights go as signed bytes, so that nothing has to be taken back. With i8mm two rows and more go
// to its instruction, which wants eight columns of two outputs (product_i8mm.inl).

// Chunk `chunk` of outputs 4v .. 4v + 3 of a block. `table`: the values as they are.
template <class FORM>
INLINE int8x16_t coded_bytes(const uint8_t* q, int chunk, int v, int8x16_t table) {
  constexpr bool kNibbles = FORM::bits >= 4, kTwos = FORM::bits != 4;
  uint8x16_t code = vdupq_n_u8(0);
  if (kNibbles) {
    const uint8x16_t raw = vld1q_u8(q + 64 * (chunk % 4) + 16 * v);
    code = chunk < 4 ? vandq_u8(raw, vdupq_n_u8(15)) : vshrq_n_u8(raw, 4);
  }
  if (kTwos) {
    const uint8x16_t raw = vld1q_u8(q + (kNibbles ? 256 : 0) + 64 * (chunk / 4) + 16 * v);
    const uint8x16_t moved = vshlq_u8(raw, vdupq_n_s8(int8_t((kNibbles ? 4 : 0) - 2 * (chunk % 4))));
    code = vorrq_u8(code, vandq_u8(moved, vdupq_n_u8(kNibbles ? 0x30 : 3)));
  }
  if (FORM::bits == 3) {
    const uint8_t* third = q + 128 + 8 * chunk + 2 * v;
    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(third[0]), vdup_n_u8(third[1]));
    const uint8x16_t set = vtstq_u8(bytes, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)));
    code = vorrq_u8(code, vandq_u8(set, vdupq_n_u8(4)));
  }
  if (FORM::table) return vqtbl1q_s8(table, code);
  return vreinterpretq_s8_u8(vsubq_u8(code, vdupq_n_u8(uint8_t(FORM::zero))));
}

// Adds the products of chunk 4 * HALF + J: `a` has half of each row's block, a chunk to a lane.
template <class FORM, int HALF, int J, int T, int V>
INLINE void add_coded_chunk(const uint8_t* q, int first, int8x16_t table, const int8x16_t (&a)[T],
                            int32x4_t (&dot)[T][V]) {
  for (int v = 0; v < V; ++v) {
    const int8x16_t weights = coded_bytes<FORM>(q, 4 * HALF + J, first + v, table);
    for (int t = 0; t < T; ++t) dot[t][v] = vdotq_laneq_s32(dot[t][v], weights, a[t], J);
  }
}

// The integer products of half of a block's inputs with vectors first .. first + V - 1, of four outputs each.
template <class FORM, int HALF, int T, int V>
INLINE void coded_dots(const uint8_t* q, const int8_t* x, int first, int8x16_t table, int32x4_t (&dot)[T][V]) {
  int8x16_t a[T];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) dot[t][v] = vdupq_n_s32(0);
  load_half<HALF>(x, a);
  add_coded_chunk<FORM, HALF, 0>(q, first, table, a, dot), add_coded_chunk<FORM, HALF, 1>(q, first, table, a, dot);
  add_coded_chunk<FORM, HALF, 2>(q, first, table, a, dot), add_coded_chunk<FORM, HALF, 3>(q, first, table, a, dot);
}

#if KERNEL_ISA == ISA_NEON_I8MM
// The same of two rows and more.
template <class FORM, int HALF, int T, int V>
INLINE void paired_coded_dots(const uint8_t* q, const int8_t* x, int first, int8x16_t table, int32x4_t (&dot)[T][V]) {
  constexpr int kPairs = (T + 1) / 2;
  int32x4_t sum[kPairs][2 * V];
  for (int p = 0; p < kPairs; ++p)
    for (int i = 0; i < 2 * V; ++i) sum[p][i] = vdupq_n_s32(0);
  for (int eight = 2 * HALF; eight < 2 * HALF + 2; ++eight) {
    int8x16_t a[kPairs];
    for (int p = 0; p < T / 2; ++p) a[p] = vld1q_s8(x + 64 * p + 16 * eight);
    if (T % 2) {
      const int8x8_t last = vld1_s8(x + 32 * (T - 1) + 8 * eight);
      a[T / 2] = vcombine_s8(last, last);
    }
    for (int v = 0; v < V; ++v) {
      const int32x4_t one = vreinterpretq_s32_s8(coded_bytes<FORM>(q, 2 * eight, first + v, table));
      const int32x4_t next = vreinterpretq_s32_s8(coded_bytes<FORM>(q, 2 * eight + 1, first + v, table));
      const int8x16_t lower = vreinterpretq_s8_s32(vzip1q_s32(one, next));
      const int8x16_t upper = vreinterpretq_s8_s32(vzip2q_s32(one, next));
      for (int p = 0; p < kPairs; ++p) {
        sum[p][2 * v] = vmmlaq_s32(sum[p][2 * v], a[p], lower);
        sum[p][2 * v + 1] = vmmlaq_s32(sum[p][2 * v + 1], a[p], upper);
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) {
      const int64x2_t lower = vreinterpretq_s64_s32(sum[t / 2][2 * v]);
      const int64x2_t upper = vreinterpretq_s64_s32(sum[t / 2][2 * v + 1]);
      dot[t][v] = vreinterpretq_s32_s64(t % 2 ? vzip2q_s64(lower, upper) : vzip1q_s64(lower, upper));
    }
}
#endif

// Both halves of the pairs of 16-bit numbers at `pairs`, 32 bits each.
struct Halves {
  int32x4_t first, second;
};
INLINE Halves halves_of(int16x8_t pairs) {
  const int32x4_t both = vreinterpretq_s32_s16(pairs);
  return Halves{vshrq_n_s32(vshlq_n_s32(both, 16), 16), vshrq_n_s32(both, 16)};
}

template <int T, class FORM>
INLINE void add_coded(const Block& block, F (&total)[T]) {
  constexpr int kVectors = T == 1 ? 4 : T <= 4 ? 2 : 1;
  const int8x16_t table =
      vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(block.table), vdupq_n_u8(uint8_t(FORM::zero))));
  for (int at = 0; at < 4; at += kVectors) {
    int32x4_t dot[T][kVectors], other[T][kVectors];
#if KERNEL_ISA == ISA_NEON_I8MM
    if constexpr (T > 1) {
      paired_coded_dots<FORM, 0>(block.q, block.x, at, table, dot);
      paired_coded_dots<FORM, 1>(block.q, block.x, at, table, other);
    } else
#endif
    {
      coded_dots<FORM, 0>(block.q, block.x, at, table, dot);
      coded_dots<FORM, 1>(block.q, block.x, at, table, other);
    }
    for (int v = 0; v < kVectors; ++v) {
      VF d = halves_at(block.scale + 4 * (at + v));
      if (FORM::table) d *= block.unit;
      VF m{};
      Halves scale{}, low{};
      if (FORM::sub) {
        const uint8x8_t raw = vld1_u8(block.sub + 8 * (at + v));
        if (FORM::minimum) {
          m = halves_at(block.minimum + 4 * (at + v));
          scale = halves_of(vreinterpretq_s16_u16(vmovl_u8(vand_u8(raw, vdup_n_u8(15)))));
          low = halves_of(vreinterpretq_s16_u16(vmovl_u8(vshr_n_u8(raw, 4))));
        } else {
          scale = halves_of(vmovl_s8(vreinterpret_s8_u8(raw)));
        }
      }
      for (int t = 0; t < T; ++t) {
        int32x4_t whole = vaddq_s32(dot[t][v], other[t][v]);
        if (FORM::sub) whole = vmlaq_s32(vmulq_s32(dot[t][v], scale.first), other[t][v], scale.second);
        const float s = block.activation_scale[t];
        VF part = d * s * (VF)vcvtq_f32_s32(whole);
        if (FORM::minimum) {
          int32_t sums;
          std::memcpy(&sums, block.start + t, 4);
          const int32x4_t lows = vmlaq_n_s32(vmulq_n_s32(low.first, int16_t(sums)), low.second, sums >> 16);
          part += m * ((VF)vcvtq_f32_s32(lows) * s);
        }
        total[t].p[at + v] += part;
      }
    }
  }
}
