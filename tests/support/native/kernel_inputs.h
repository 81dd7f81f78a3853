// What kernel_hashes.cpp feeds the kernels: numbers that are the same on every machine, in the records of abi.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "../../../specdec/kernels/csrc/abi.h"

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  int64_t below(int64_t limit) { return int64_t(next() >> 1) % limit; }
  float real() { return float(int32_t(next()) >> 8) / 8388608; }  // -1 to 1, every value a float
  std::vector<float> reals(int64_t count, float scale = 1) {
    std::vector<float> made(count);
    for (float& value : made) value = real() * scale;
    return made;
  }
  // Of very different sizes, zeros among them.
  std::vector<float> wild(int64_t count) {
    std::vector<float> made(count);
    for (float& value : made) {
      value = real();
      value = next() % 16 ? std::ldexp(value, int(below(30)) - 15) : 0.0f;
    }
    return made;
  }
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> made(count);
    for (uint8_t& value : made) value = uint8_t(next() >> 8);
    return made;
  }

 private:
  uint64_t state_;
};

// FNV-1a of numbers, of floats by their bits. Which bits a NaN has is the processor's affair: here all have the same.
class Hash {
 public:
  void add(const std::vector<float>& values) {
    for (float value : values) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      put(value != value ? 0x7fc00000 : bits);
    }
  }
  template <class Number>
  void add(const std::vector<Number>& values) {
    for (Number value : values) put(uint64_t(int64_t(value)));
  }
  void add(int64_t value) { put(uint64_t(value)); }
  uint64_t value() const { return value_; }

 private:
  void put(uint64_t number) {
    for (int i = 0; i < 8; ++i) value_ = (value_ ^ (number >> 8 * i & 255)) * 1099511628211u;
  }
  uint64_t value_ = 14695981039346656037u;
};

// A form of packed weights.
struct Kind {
  int bits;
  bool minimum = false, table = false, sub = false;
};

constexpr Kind kKinds[] = {{4},
                           {4, true},
                           {5},
                           {5, true},
                           {8},
                           {4, false, true},
                           {6, false, false, true},
                           {3, false, false, true},
                           {4, false, true, true},
                           {3, false, true, true},
                           {2, true, false, true}};

std::string name_of(const Kind& kind) {
  return std::to_string(kind.bits) + " bits" + (kind.minimum ? " minimum" : "") + (kind.table ? " table" : "") +
         (kind.sub ? " sub" : "");
}

// A packed matrix whose weights are about 0.1, and its bias.
struct Packed {
  int64_t outputs, columns;
  int bits;
  std::vector<uint8_t> q, sub;
  std::vector<uint16_t> scale, minimum;
  std::vector<int8_t> table;
  std::vector<float> bias;

  Packed(Random& random, int64_t outputs, int64_t columns, int bits, bool with_minimum, bool with_bias = false)
      : Packed(random, outputs, columns, Kind{bits, with_minimum}, with_bias) {}
  Packed(Random& random, int64_t outputs, int64_t columns, Kind kind, bool with_bias = false)
      : outputs(outputs), columns(columns), bits(kind.bits) {
    const bool with_minimum = kind.minimum;
    const int64_t blocks = (outputs + 15) / 16 * (columns / 32);
    q = random.bytes(blocks * 64 * bits);
    scale.resize(blocks * 16);
    if (with_minimum) minimum.resize(blocks * 16);
    // of the halves that are scales
    const int exponent = kind.sub ? 1 : kind.table ? 5 : bits == 4 ? 8 : bits == 5 ? 7 : 4;
    if (kind.sub) sub = random.bytes(blocks * 32);
    for (int i = 0; kind.table && i < 16; ++i) {
      const int low = kind.sub ? -64 : -127, high = kind.sub ? 63 : 127;
      table.push_back(int8_t(i == 0 ? low : i == 1 ? high : low + random.below(high - low)));
    }
    for (uint16_t& half : scale) half = uint16_t((exponent + random.below(2)) << 10 | random.below(1024));
    for (uint16_t& half : minimum) half = uint16_t(0x8000 | (exponent + 3) << 10 | random.below(1024));
    if (with_bias) bias = random.reals(outputs);
  }
  Weights weights() const {
    return {q.data(), scale.data(), minimum.empty() ? nullptr : minimum.data(), sub.empty() ? nullptr : sub.data(),
            table.empty() ? nullptr : table.data(), columns / 32, bits, table.empty() ? 1.0 : 0.5};
  }
  Matrix matrix() const { return {weights(), bias.empty() ? nullptr : bias.data(), outputs}; }
};

// Keys and values of `slots` slots, or values alone and what makes keys of them, for positions below `positions`.
struct Stored {
  int64_t type, heads, slots, width, value_width, pairs;
  std::vector<float> wide[2], scale[2], weight, cos, sin;
  std::vector<uint16_t> half[2];
  std::vector<int8_t> narrow[2];
  bool has_keys;

  Stored(Random& random, int64_t type, bool has_keys, int64_t heads, int64_t slots, int64_t width, int64_t value_width,
         int64_t positions)
      : type(type), heads(heads), slots(slots), width(width), value_width(value_width), pairs(width / 2 - 1),
        has_keys(has_keys) {
    for (int part = has_keys ? 0 : 1; part < 2; ++part) {
      const int64_t count = heads * slots * (part ? value_width : width);
      wide[part] = random.reals(count);
      if (type == kBfloat16)
        for (float value : wide[part]) {
          uint32_t bits;
          std::memcpy(&bits, &value, sizeof(bits));
          half[part].push_back(uint16_t(bits >> 16));
        }
      if (type != kInt8) continue;
      for (float value : wide[part]) narrow[part].push_back(int8_t(value * 127));
      scale[part] = random.reals(heads * slots, 0.01f);
    }
    if (has_keys) return;
    weight = random.reals(width);
    cos = random.reals(positions * pairs);
    sin = random.reals(positions * pairs);
  }
  KV record() const {
    KV kv{plane(0, width), plane(1, value_width), weight.data(), cos.data(),  sin.data(),
          type,            slots,                 width,         value_width, pairs};
    if (!has_keys) kv.keys = {};
    return kv;
  }
  void add_to(Hash& hash) const {
    for (int part = 0; part < 2; ++part) {
      if (type == kFloat32) hash.add(wide[part]);
      if (type == kBfloat16) hash.add(half[part]);
      if (type == kInt8) hash.add(narrow[part]), hash.add(scale[part]);
    }
  }

 private:
  Plane plane(int part, int64_t row) const {
    const void* data = wide[part].data();
    if (type == kBfloat16) data = half[part].data();
    if (type == kInt8) data = narrow[part].data();
    return {data, scale[part].empty() ? nullptr : scale[part].data(), slots * row, row};
  }
};

// A low-rank part of a matrix [outputs, columns], in float32 or bfloat16.
struct Lower {
  std::vector<float> down, up;
  std::vector<uint16_t> narrow_down, narrow_up;
  LowRank part;

  Lower(Random& random, int64_t outputs, int64_t columns, int64_t rank, bool wide)
      : down(random.reals((columns + 15) / 16 * 16 * rank)), up(random.reals((outputs + 15) / 16 * 16 * rank)) {
    part = {down.data(), up.data(), rank, wide, 0.3f};
    if (wide) return;
    narrow_down = halves(down), narrow_up = halves(up);
    part.down = narrow_down.data(), part.up = narrow_up.data();
  }
  static std::vector<uint16_t> halves(const std::vector<float>& from) {
    std::vector<uint16_t> to;
    for (float value : from) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      to.push_back(uint16_t(bits >> 16));
    }
    return to;
  }
};

// A mixture of experts beside the MLP of a layer of `hidden` columns.
struct Mixed {
  static constexpr int64_t kExperts = 7, kUsed = 3, kInner = 32;
  Packed gate_up, down;
  Lower router;
  std::vector<float> wide, scale;
  Mixture record;

  Mixed(Random& random, int64_t hidden, Kind kind)
      : gate_up(random, kExperts * 2 * kInner, hidden, kind),
        down(random, kExperts * hidden, kInner, 5, true),
        router(random, 16, hidden, 8, true),
        wide(random.reals(hidden)),
        scale(random.reals(kExperts)) {
    record = {gate_up.weights(), down.weights(), router.part, wide.data(), scale.data(), wide.data(), wide.data(),
              wide.data(), kExperts, kUsed, kInner, 0, nullptr};
  }
};

// A decoder layer of a made-up family: `rich` has everything that a layer may have, the other the least.
struct Decoder {
  static constexpr int64_t kHidden = 64, kHeads = 6, kKvHeads = 2, kWidth = 32, kInner = 160, kExtra = 32;
  Packed q, k, v, o, gate, up, down, ple_gate, ple_projection;
  Mixed mixed;
  std::vector<float> wide, narrow;
  Layer layer;

  Decoder(Random& random, Kind kind, bool rich, bool values_alone, bool reads = false)
      : q(random, kHeads * kWidth, kHidden, kind, rich),
        k(random, kKvHeads * kWidth, kHidden, kind, rich),
        v(random, kKvHeads * kWidth, kHidden, kind),
        o(random, kHidden, kHeads * kWidth, 8, false),
        gate(random, kInner, kHidden, kind, rich),
        up(random, kInner, kHidden, kind, rich),
        down(random, kHidden, kInner, 5, rich),
        ple_gate(random, kExtra, kHidden, 4, true),
        ple_projection(random, kHidden, kExtra, 4, false),
        mixed(random, kHidden, kind),
        wide(random.reals(kHidden)),
        narrow(random.reals(kWidth)) {
    layer = {q.matrix(), k.matrix(), v.matrix(), o.matrix(), gate.matrix(), up.matrix(), down.matrix(), {}, {},
             wide.data(), nullptr, nullptr, nullptr, wide.data(), nullptr, nullptr, nullptr,
             kHeads, kKvHeads, kWidth, 0, 0, rich ? kGeluTanh : kSilu, rich, 1e-6f, 0.2f, nullptr};
    if (values_alone) layer.v = {};
    if (reads) layer.k = layer.v = {};
    if (!rich) return;
    layer.ple_gate = ple_gate.matrix(), layer.ple_projection = ple_projection.matrix();
    layer.q_norm = layer.k_norm = narrow.data();
    layer.attention_post_norm = layer.mlp_post_norm = layer.ple_norm = wide.data();
    layer.scalar = narrow.data();
    layer.experts = &mixed.record;
  }
};

}  // namespace
