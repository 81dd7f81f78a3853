// The product of block-quantised weights with quantised activations, for one instruction set (see simd.inl). The
// arithmetic is written down in reference.py, the layout in blocks.py; quantise.inl makes the activations.

// How weights are stored: the bits of a code, whether there is a minimum, whether a code is a place in a table, and
// whether the block's scale is multiplied by one of each sixteen inputs (`sub`). coded/ has the products of the last two.
template <int BITS, bool MINIMUM, bool TABLE = false, bool SUB = false>
struct Form {
  static constexpr int bits = BITS;
  static constexpr bool minimum = MINIMUM, table = TABLE, sub = SUB;
  static constexpr bool coded = TABLE || SUB;
  // what is added to a weight, so that it is a byte without a sign
  static constexpr int zero = TABLE ? (SUB ? 64 : 128) : MINIMUM ? 0 : 1 << (BITS - 1);
  static constexpr Kind start = SUB ? kHalves : TABLE || BITS == 8 ? kBy128 : BITS == 5 ? kBy16 : kBy8;
};

// One block of sixteen outputs, and what the rows of a tile have for it, from the first row on. `start`: integers as
// bits, of the weights' kind (quantise.inl); `term`: of kMinimum. `table`: sixteen values, moved by Form::zero.
// `unit`: of the scales that such codes have.
struct Block {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* minimum;
  const uint8_t* sub;
  const uint8_t* table;
  float unit;
  const int8_t* x;
  const float* activation_scale;
  const float* start;
  const float* term;

  Block from(int row) const {
    return Block{q, scale, minimum, sub, table, unit, x + 32 * row, activation_scale + row, start + row, term + row};
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

#include "coded/coded.inl"

constexpr int64_t kAhead = 8;  // blocks between what is prefetched and what is used

// Sixteen outputs of T rows; `y` is the first of them, rows `stride` floats apart, `count` of them wanted. A function of
// its own for each T and form: it has all registers, and profiles and test_object_code.py see it by name.
template <int T, class FORM>
__attribute__((noinline)) void gemm_tile(const Weights& w, int64_t group, const Tile& tile, float* y, int64_t stride,
                                         int count) {
  constexpr int BITS = FORM::bits;
  constexpr bool MINIMUM = FORM::minimum;
  const uint8_t* q = w.q + group * w.blocks * (64 * BITS);
  const uint16_t* scale = w.scale + group * w.blocks * 16;
  const uint16_t* minimum = MINIMUM ? w.minimum + group * w.blocks * 16 : nullptr;
  const uint8_t* sub = FORM::sub ? w.sub + group * w.blocks * 32 : nullptr;
  alignas(16) uint8_t table[16] = {};
  for (int i = 0; FORM::table && i < 16; ++i) table[i] = uint8_t(w.table[i] + FORM::zero);
  const float* start = tile.term[FORM::start];
  F total[T];
  for (int t = 0; t < T; ++t) total[t] = splat(0.0f);
  for (int64_t b = 0; b < w.blocks; ++b) {
    // the hardware's prefetcher stops at pages and does not follow three streams: worth 1.3x from memory
    for (int j = 0; j < BITS; ++j) __builtin_prefetch(q + (b + kAhead) * (64 * BITS) + 64 * j);
    if (b % 2 == 0) {
      __builtin_prefetch(scale + (b + kAhead) * 16);
      if (MINIMUM) __builtin_prefetch(minimum + (b + kAhead) * 16);
      if (FORM::sub) __builtin_prefetch(sub + (b + kAhead) * 32);
    }
    const Block block{q + b * (64 * BITS),
                      scale + b * 16,
                      MINIMUM ? minimum + b * 16 : nullptr,
                      FORM::sub ? sub + b * 32 : nullptr,
                      table,
                      float(w.unit),
                      tile.values + b * (T * 32),
                      tile.scale + b * T,
                      start + b * T,
                      tile.term[kMinimum] + b * T};
    if constexpr (FORM::coded)
      add_coded<T, FORM>(block, total);
    else
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
  const auto run = [&](auto form) { gemm_tile<T, decltype(form)>(w, group, tile, y, stride, count); };
  if (w.sub) {
    if (w.bits == 6) return run(Form<6, false, false, true>());
    if (w.bits == 4) return run(Form<4, false, true, true>());
    if (w.bits == 2) return run(Form<2, true, false, true>());
    return w.table ? run(Form<3, false, true, true>()) : run(Form<3, false, false, true>());
  }
  if (w.table) return run(Form<4, false, true>());
  if (w.bits == 8) return run(Form<8, false>());
  if (w.bits == 5) return w.minimum ? run(Form<5, true>()) : run(Form<5, false>());
  return w.minimum ? run(Form<4, true>()) : run(Form<4, false>());
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
