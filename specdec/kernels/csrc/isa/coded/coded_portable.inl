// coded.inl for any processor.

template <int T, class FORM>
INLINE void add_coded(const Block& block, F (&total)[T]) {
  int8_t values[512];  // chunk by chunk, once for all T rows
  for (int at = 0; at < 512; ++at) {
    const int code = code_at(block.q, FORM::bits, at / 64, at % 64);
    values[at] = int8_t((FORM::table ? block.table[code] : code) - FORM::zero);
  }
  const F d = half_to_float(block.scale) * splat(block.unit);
  for (int t = 0; t < T; ++t) {
    int32_t halves[2][16] = {}, dot[16], low[16];
    for (int c = 0; c < 8; ++c)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 4; ++i) halves[c / 4][r] += values[64 * c + 4 * r + i] * block.x[t * 32 + 4 * c + i];
    int32_t sums = 0;
    if (FORM::sub) std::memcpy(&sums, block.start + t, 4);
    for (int r = 0; r < 16; ++r) {
      const int first = FORM::sub ? block.sub[2 * r] : 1, second = FORM::sub ? block.sub[2 * r + 1] : 1;
      if (FORM::minimum) {
        dot[r] = (first & 15) * halves[0][r] + (second & 15) * halves[1][r];
        low[r] = (first >> 4) * int16_t(sums) + (second >> 4) * (sums >> 16);
      } else {
        dot[r] = int8_t(first) * halves[0][r] + int8_t(second) * halves[1][r];
      }
    }
    F part = (splat(block.activation_scale[t]) * d) * convert(load(dot));
    if (FORM::minimum)
      part = part + half_to_float(block.minimum) * (splat(block.activation_scale[t]) * convert(load(low)));
    total[t] = total[t] + part;
  }
}
