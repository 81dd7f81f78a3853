// The product of block-quantised weights with quantised activations, for one instruction set (see simd.inl). The
// arithmetic is written down in reference.py, the layout in blocks.py.

// ---- activations: one row of K floats to int8 blocks -----------------------------------------------------

// Writes row r of `tile`: values at [b][r][32], scale at [b][r], and what a block adds beside its products at
// [b][r] of `term`, one array per kind of weights: scale * sum (with a minimum), -8 * sum, -16 * sum and -128 * sum
// (integers kept as bits).
void quantise_row(const float* x, int64_t blocks, int r, const Tile& tile) {
  const int rows = tile.rows;
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even, as the default mode does
  for (int64_t b = 0; b < blocks; ++b) {
    F low = load(x + 32 * b), high = load(x + 32 * b + 16);
    const I absolute = splat(int32_t(0x7fffffff));
    // as integers, magnitudes are ordered, with NaN above infinity
    I top = maximum(bits(low) & absolute, bits(high) & absolute);
    const int32_t most = largest(top);
    float magnitude;
    std::memcpy(&magnitude, &most, 4);
    const bool finite = most < 0x7f800000, usable = finite && magnitude >= 1e-30f;
    const float inverse = usable ? 127.0f / magnitude : 0.0f;
    float scale = usable ? magnitude / 127.0f : 0.0f;
    if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
    int8_t* to = tile.values + (b * rows + r) * 32;
    int32_t total = 0;
    if (usable) {
      const I first = bits(low * splat(inverse) + magic) - bits(magic);
      const I second = bits(high * splat(inverse) + magic) - bits(magic);
      total = sum(first + second);
#if KERNEL_ISA == 5
      _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)first.p[0]));
      _mm_storeu_si128((__m128i*)(to + 16), _mm512_cvtepi32_epi8((__m512i)second.p[0]));
#else
      EACH for (int i = 0; i < kLanes; ++i) {
        to[e * kLanes + i] = int8_t(first.p[e][i]);
        to[16 + e * kLanes + i] = int8_t(second.p[e][i]);
      }
#endif
    } else {
      std::memset(to, 0, 32);
    }
    tile.scale[b * rows + r] = scale;
    tile.term[kMinimum][b * rows + r] = scale * float(total);
    const auto put = [&](Kind kind, int32_t value) INLINE_LAMBDA {
      std::memcpy(tile.term[kind] + b * rows + r, &value, 4);
    };
    put(kBy8, -8 * total);
    put(kBy16, -16 * total);
    put(kBy128, -128 * total);
  }
}

// ---- integer products of one block: sixteen weight rows against T activation rows -----------------------

#if KERNEL_ISA == 2
// Adds where the sum is, now. Nothing is emitted for the empty statement, but a compiler must have the sum at hand there:
// g++ otherwise moves all additions of a block behind all of its products, which wait on the stack meanwhile.
INLINE void add_now(__m256i& sum, __m256i products) {
  sum = _mm256_add_epi16(sum, products);
  __asm__("" : "+x"(sum));
}
#endif

template <int T, int BITS>
INLINE void block_dots(const uint8_t* q, const int8_t* x, I (&dot)[T]) {
#if KERNEL_ISA == 5
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
#elif KERNEL_ISA == 2
  // A pair of byte products is at most 2 * 15 * 127 with 4 bits, of which eight fit 16 bits, and 2 * 31 * 127 with 5,
  // of which four do. 8-bit weights go as two nibbles, because pairs of whole bytes would saturate.
  const __m256i mask = _mm256_set1_epi8(15);
  const auto four_at = [&](int t, int chunk) INLINE_LAMBDA {
    int32_t four;
    std::memcpy(&four, x + t * 32 + 4 * chunk, 4);
    return _mm256_set1_epi32(four);
  };
  for (int h = 0; h < 2; ++h) {  // rows 0..7, 8..15
    const auto whole = [&](__m256i nibbles, int chunk) INLINE_LAMBDA {
      const __m256i low = _mm256_and_si256(nibbles, mask);
      if (BITS != 5) return low;
      int32_t fifth;
      std::memcpy(&fifth, q + 256 + 8 * chunk + 4 * h, 4);
      const __m256i bytes = _mm256_shuffle_epi8(
          _mm256_set1_epi32(fifth), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
      const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
      return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(16)));
    };
    __m256i small[T], large[T];
    for (int t = 0; t < T; ++t) small[t] = large[t] = _mm256_setzero_si256();
    for (int j = 0; j < (BITS == 8 ? 8 : 4); ++j) {
      const __m256i raw = _mm256_loadu_si256((const __m256i*)(q + 64 * j + 32 * h));
      const __m256i low = whole(raw, j), high = whole(_mm256_srli_epi16(raw, 4), 4 + j);
      for (int t = 0; t < T; ++t) {
        const __m256i a = four_at(t, j);
        const __m256i b = BITS == 8 ? a : four_at(t, 4 + j);
        add_now(small[t], _mm256_maddubs_epi16(low, a));
        add_now(BITS == 4 ? small[t] : large[t], _mm256_maddubs_epi16(high, b));
      }
    }
    for (int t = 0; t < T; ++t) {
      dot[t].p[h] += (VI)_mm256_madd_epi16(small[t], _mm256_set1_epi16(1));
      if (BITS != 4) dot[t].p[h] += (VI)_mm256_madd_epi16(large[t], _mm256_set1_epi16(BITS == 8 ? 16 : 1));
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

constexpr int64_t kAhead = 8;  // blocks between what is prefetched and what is used

// Sixteen outputs of T rows; `y` is the first of them, rows `stride` floats apart, `count` of them wanted.
template <int T, int BITS, bool MINIMUM>
void gemm_tile(const Weights& w, int64_t group, const Tile& tile, float* y, int64_t stride, int count) {
  const uint8_t* q = w.q + group * w.blocks * (64 * BITS);
  const uint16_t* scale = w.scale + group * w.blocks * 16;
  const uint16_t* minimum = MINIMUM ? w.minimum + group * w.blocks * 16 : nullptr;
  const float* terms = tile.term[MINIMUM ? kMinimum : BITS == 4 ? kBy8 : BITS == 5 ? kBy16 : kBy128];
  F total[T];
  for (int t = 0; t < T; ++t) total[t] = splat(0.0f);
  for (int64_t b = 0; b < w.blocks; ++b) {
    // the hardware's prefetcher stops at pages and does not follow three streams: worth 1.3x from memory
    for (int j = 0; j < BITS; ++j) __builtin_prefetch(q + (b + kAhead) * (64 * BITS) + 64 * j);
    if (b % 2 == 0) {
      __builtin_prefetch(scale + (b + kAhead) * 16);
      if (MINIMUM) __builtin_prefetch(minimum + (b + kAhead) * 16);
    }
    const float* activation_scale = tile.scale + b * T;
    const float* term = terms + b * T;
    I dot[T];
    for (int t = 0; t < T; ++t) {
      int32_t start = 0;
      if (!MINIMUM) std::memcpy(&start, term + t, 4);
      dot[t] = splat(start);
    }
    block_dots<T, BITS>(q + b * (64 * BITS), tile.values + b * (T * 32), dot);
    const F d = half_to_float(scale + b * 16);
    F m;
    if (MINIMUM) m = half_to_float(minimum + b * 16);
    for (int t = 0; t < T; ++t) {
      F part = (splat(activation_scale[t]) * d) * convert(dot[t]);
      if (MINIMUM) part = part + m * splat(term[t]);
      total[t] = total[t] + part;
    }
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
