// The product of block-quantised weights with quantised activations, for one instruction set (see simd.inl). The
// arithmetic is written down in reference.py, the layout in blocks.py; quantise.inl makes the activations.

// One block of sixteen outputs, and what the rows of a tile have for it, from the first row on. `start`: integers as
// bits, of the weights' kind (quantise.inl); `term`: of kMinimum.
struct Block {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* minimum;
  const int8_t* x;
  const float* activation_scale;
  const float* start;
  const float* term;

  Block from(int row) const {
    return Block{q, scale, minimum, x + 32 * row, activation_scale + row, start + row, term + row};
  }
};

#if KERNEL_IS_NEON
#include "product_neon.inl"
#elif KERNEL_ISA == ISA_AVX2
#include "product_256.inl"
#include "product_avx2.inl"
#elif KERNEL_ISA == ISA_AVX_VNNI
#include "product_256.inl"
#include "product_vnni.inl"
#else
// The integer products of a block: sixteen outputs against T rows.
template <int T, int BITS>
INLINE void block_dots(const uint8_t* q, const int8_t* x, I (&dot)[T]) {
#if KERNEL_ISA == ISA_AVX512
  const auto step = [&](__m512i weights, int chunk) INLINE_LAMBDA {
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, x + t * 32 + 4 * chunk, 4);
      dot[t].p[0] = (VI)_mm512_dpbusd_epi32((__m512i)dot[t].p[0], weights, _mm512_set1_epi32(four));
    }
  };
  const auto whole = [&](__m512i nibbles, int chunk) INLINE_LAMBDA {
    const __m512i low = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
    if (BITS == 4) return low;
    uint64_t fifth;
    std::memcpy(&fifth, q + 256 + 8 * chunk, 8);
    return _mm512_mask_add_epi8(low, fifth, low, _mm512_set1_epi8(16));
  };
  if (BITS == 8) {
    for (int c = 0; c < 8; ++c) step(_mm512_loadu_si512(q + 64 * c), c);
  } else {
    for (int j = 0; j < 4; ++j) {
      const __m512i raw = _mm512_loadu_si512(q + 64 * j);
      step(whole(raw, j), j);
      step(whole(_mm512_srli_epi16(raw, 4), 4 + j), 4 + j);
    }
  }
#else
  uint8_t whole[512];  // a byte a weight, chunk by chunk, once for all T rows
  if (BITS != 8) {
    for (int at = 0; at < 256; ++at) {
      whole[at] = q[at] & 15;
      whole[256 + at] = q[at] >> 4;
    }
    for (int at = 0; BITS == 5 && at < 64; ++at) {
      // eight weights at a time, which compilers do not find by themselves: byte k of `one` keeps bit k where it is
      const uint64_t one = q[256 + at] * 0x0101010101010101u & 0x8040201008040201u;
      uint64_t eight;
      std::memcpy(&eight, whole + 8 * at, 8);
      eight |= (one + 0x7f7f7f7f7f7f7f7fu) >> 3 & 0x1010101010101010u;
      std::memcpy(whole + 8 * at, &eight, 8);
    }
  }
  const uint8_t* from = BITS == 8 ? q : whole;
  for (int t = 0; t < T; ++t) {
    int32_t total[16] = {};
    for (int c = 0; c < 8; ++c)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 4; ++i) total[r] += from[64 * c + 4 * r + i] * x[t * 32 + 4 * c + i];
    EACH dot[t].p[e] += *reinterpret_cast<const VI*>(total + e * kLanes);
  }
#endif
}

// Adds a block's terms to the totals of T rows.
template <int T, int BITS, bool MINIMUM>
INLINE void add_block(const Block& block, F (&total)[T]) {
  I dot[T];
  for (int t = 0; t < T; ++t) {
    int32_t start = 0;
    if (!MINIMUM) std::memcpy(&start, block.start + t, 4);
    dot[t] = splat(start);
  }
  block_dots<T, BITS>(block.q, block.x, dot);
  const F d = half_to_float(block.scale);
  F m;
  if (MINIMUM) m = half_to_float(block.minimum);
  for (int t = 0; t < T; ++t) {
    F part = (splat(block.activation_scale[t]) * d) * convert(dot[t]);
    if (MINIMUM) part = part + m * splat(block.term[t]);
    total[t] = total[t] + part;
  }
}
#endif

constexpr int64_t kAhead = 8;  // blocks between what is prefetched and what is used

// Sixteen outputs of T rows; `y` is the first of them, rows `stride` floats apart, `count` of them wanted.
template <int T, int BITS, bool MINIMUM>
void gemm_tile(const Weights& w, int64_t group, const Tile& tile, float* y, int64_t stride, int count) {
  const uint8_t* q = w.q + group * w.blocks * (64 * BITS);
  const uint16_t* scale = w.scale + group * w.blocks * 16;
  const uint16_t* minimum = MINIMUM ? w.minimum + group * w.blocks * 16 : nullptr;
  const float* start = tile.term[BITS == 4 ? kBy8 : BITS == 5 ? kBy16 : kBy128];
  F total[T];
  for (int t = 0; t < T; ++t) total[t] = splat(0.0f);
  for (int64_t b = 0; b < w.blocks; ++b) {
    // the hardware's prefetcher stops at pages and does not follow three streams: worth 1.3x from memory
    for (int j = 0; j < BITS; ++j) __builtin_prefetch(q + (b + kAhead) * (64 * BITS) + 64 * j);
    if (b % 2 == 0) {
      __builtin_prefetch(scale + (b + kAhead) * 16);
      if (MINIMUM) __builtin_prefetch(minimum + (b + kAhead) * 16);
    }
    const Block block{q + b * (64 * BITS),
                      scale + b * 16,
                      MINIMUM ? minimum + b * 16 : nullptr,
                      tile.values + b * (T * 32),
                      tile.scale + b * T,
                      start + b * T,
                      tile.term[kMinimum] + b * T};
    add_block<T, BITS, MINIMUM>(block, total);
#if KERNEL_LANES == 8
    if (T > 1) __asm__ volatile("" : : "r"(total) : "memory");  // keeps totals out of registers, which sums need
#endif
  }
  for (int t = 0; t < T; ++t) {
    if (count == 16) {
      store(y + t * stride, total[t]);
    } else {
      store_part(y + t * stride, total[t], count);
    }
  }
}

template <int T>
void gemm_tile_of(const Weights& w, int64_t group, const Tile& tile, float* y, int64_t stride, int count) {
  if (w.bits == 8) return gemm_tile<T, 8, false>(w, group, tile, y, stride, count);
  if (w.bits == 5)
    return (w.minimum ? gemm_tile<T, 5, true> : gemm_tile<T, 5, false>)(w, group, tile, y, stride, count);
  return (w.minimum ? gemm_tile<T, 4, true> : gemm_tile<T, 4, false>)(w, group, tile, y, stride, count);
}

void multiply(const Weights& w, int64_t group, const Tile& tile, float* y, int64_t stride, int count) {
  switch (tile.rows) {
    case 1: return gemm_tile_of<1>(w, group, tile, y, stride, count);
    case 2: return gemm_tile_of<2>(w, group, tile, y, stride, count);
    case 3: return gemm_tile_of<3>(w, group, tile, y, stride, count);
    case 4: return gemm_tile_of<4>(w, group, tile, y, stride, count);
    case 5: return gemm_tile_of<5>(w, group, tile, y, stride, count);
    case 6: return gemm_tile_of<6>(w, group, tile, y, stride, count);
    case 7: return gemm_tile_of<7>(w, group, tile, y, stride, count);
    default: return gemm_tile_of<8>(w, group, tile, y, stride, count);
  }
}
