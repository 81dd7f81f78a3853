// kernel_hashes LIBRARY [SET]: calls every kernel of a built library (specdec/kernels/_native.*) on deterministic
// inputs of odd shapes, on instruction set SET or the library's own choice, and prints the set, then one hash of the
// results' bits for each case. All sets, compilers and processors must print the same (tests/kernels/test_sets.py,
// .ci/emulate). Exits with 2 where the library or the set cannot be used. Left out: what is right, which the reference
// says (tests/kernels).

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernel_inputs.h"

namespace {

void* library = nullptr;

template <class Signature>
Signature* function(const char* name) {
  void* found = library ? dlsym(library, name) : nullptr;
  if (found) return reinterpret_cast<Signature*>(found);
  std::fprintf(stderr, "kernel_hashes: no library that has %s\n", name);
  std::exit(2);
}

void must(int code) {
  if (!code) return;
  std::fprintf(stderr, "kernel_hashes: a kernel ended with code %d\n", code);
  std::exit(1);
}

__attribute__((format(printf, 2, 3))) void print(const Hash& hash, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf(" %016llx\n", static_cast<unsigned long long>(hash.value()));
}

// Rows of which some are zero, tiny, the largest that are quantised exactly, or no numbers.
std::vector<float> activations(Random& random, int64_t rows, int64_t columns) {
  std::vector<float> x = random.wild(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x.data() + r * columns + columns - 32;
    for (int i = 0; i < 32; ++i) {
      if (r % 5 == 1) row[i] = 0;
      if (r % 5 == 2) row[i] *= 1e-36f;
      if (r % 5 == 3) row[i] = row[i] < 0 ? -127 : 127;
    }
    if (r % 7 == 6) row[9] = r % 2 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
  return x;
}

void products(Random& random) {
  const auto linear =
      function<int(const float*, const Weights*, float*, int64_t, int64_t, int)>("specdec_block_linear");
  const auto unpack = function<int(const int64_t*, const Weights*, float*, int64_t, int64_t)>("specdec_block_rows");
  const int64_t shapes[][2] = {{16, 32}, {37, 96}, {200, 352}};
  for (const Kind kind : kKinds)
    for (const auto& [outputs, columns] : shapes) {
      Packed w(random, outputs, columns, kind);
      for (size_t i = 0; i < w.q.size() / 4; ++i) w.q[i] = random.next() % 8 ? 255 : 0;  // the largest sums
      const Weights record = w.weights();
      for (int64_t rows = 1; rows <= 17; ++rows) {
        const std::vector<float> x = activations(random, rows, columns);
        std::vector<float> y(rows * outputs);
        Hash hash;
        must(linear(x.data(), &record, y.data(), rows, outputs, int(1 + rows % 3)));
        hash.add(y);
        print(hash, "product %s %dx%d rows %d", name_of(kind).c_str(), int(outputs), int(columns),
              int(rows));
      }
      const std::vector<int64_t> ids = {0, outputs - 1, 7, 7};
      std::vector<float> y(ids.size() * columns);
      Hash hash;
      must(unpack(ids.data(), &record, y.data(), 4, outputs));
      hash.add(y);
      print(hash, "rows %s %dx%d", name_of(kind).c_str(), int(outputs), int(columns));
    }
}

const char* name_of(int64_t type) { return type == kFloat32 ? "float32" : type == kBfloat16 ? "bfloat16" : "int8"; }

void attentions(Random& random) {
  const auto attention = function<int(const float*, const KV*, const int64_t*, const int64_t*, float, float*, int64_t,
                                      int64_t, int64_t, int)>("specdec_attention");
  constexpr int64_t kSlots = 150, kRows = 7;
  const int64_t first[kRows] = {0, 100, 149, 40, 7, 140, 290}, end[kRows] = {150, 153, 299, 60, 7, 205, 300};
  const int64_t shapes[][4] = {{4, 2, 16, 16}, {6, 1, 20, 24}, {9, 3, 64, 64}, {5, 5, 48, 72}, {7, 1, 130, 97}};
  for (int64_t type : {kFloat32, kBfloat16, kInt8})
    for (const auto& [heads, kv_heads, width, value_width] : shapes)
      for (const bool has_keys : {true, false}) {
        const int64_t columns = has_keys ? value_width : width;
        const Stored store(random, type, has_keys, kv_heads, kSlots, width, columns, 300);
        const KV record = store.record();
        const std::vector<float> q = random.reals(kRows * heads * width, 2);
        std::vector<float> y(kRows * heads * columns);
        Hash hash;
        must(attention(q.data(), &record, first, end, 0.7f, y.data(), kRows, heads, kv_heads, int(heads % 3)));
        hash.add(y);
        print(hash, "attention %s%s %d/%d heads %dx%d", name_of(type), has_keys ? "" : " values alone", int(heads),
              int(kv_heads), int(width), int(columns));
      }
}

void rows(Random& random) {
  const auto norm =
      function<int(const float*, const float*, float, float*, int64_t, int64_t, int)>("specdec_rms_norm");
  const auto rope = function<int(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, int)>(
      "specdec_rope");
  const auto gated = function<int(const float*, const float*, int, float*, int64_t, int64_t, int)>("specdec_gated");
  for (int64_t width : {2, 6, 14, 16, 18, 32, 46, 96, 250, 576}) {
    const std::vector<float> x = random.wild(6 * width), other = random.wild(6 * width);
    std::vector<float> y(6 * width), z(6 * width), turned(6 * width);
    Hash hash;
    must(norm(x.data(), nullptr, 1e-6f, y.data(), 6, width, 1));
    must(norm(x.data(), other.data(), 1e-6f, z.data(), 6, width, 3));
    must(rope(x.data(), other.data(), other.data() + 3 * width, turned.data(), 3, 2, width, 1));
    hash.add(y), hash.add(z), hash.add(turned);
    print(hash, "norm and rope %d", int(width));
  }
  for (int64_t width : {1, 5, 16, 31, 200, 1001}) {
    std::vector<float> gate = random.reals(3 * width, 8);
    const std::vector<float> up = random.reals(3 * width, 8);
    gate[0] = std::numeric_limits<float>::quiet_NaN();
    gate[width] = 200, gate[2 * width] = -200;
    std::vector<float> y(3 * width), z(3 * width);
    Hash hash;
    must(gated(gate.data(), up.data(), 0, y.data(), 3, width, 1));
    must(gated(gate.data(), up.data(), 1, z.data(), 3, width, 2));
    hash.add(y), hash.add(z);
    print(hash, "gated %d", int(width));
  }
}

void choices(Random& random) {
  const auto best = function<int64_t(const float*, int64_t, float*)>("specdec_best");
  const auto candidates = function<int64_t(const float*, const int64_t*, int64_t, float, double, uint64_t, int64_t*)>(
      "specdec_gumbel_candidates");
  const auto choose =
      function<int64_t(const float*, int64_t, float, int64_t, double, double, uint64_t)>("specdec_sampled_token");
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t count : {1, 15, 16, 63, 64, 65, 1000, 5003})
    for (int what = 0; what < 4; ++what) {
      std::vector<float> x = random.reals(count, what == 3 ? 30 : 6);
      if (what == 0) x[random.below(count)] = nan;
      if (what == 1) x.assign(count, random.next() % 2 ? -infinity : 1.5f);
      std::vector<float> value(1);
      Hash hash;
      hash.add(best(x.data(), count, value.data()));
      hash.add(value);
      if (what > 1)
        for (uint64_t key : {1, 77, 1234567}) {
          std::vector<int64_t> ids(count), found(count);
          for (int64_t& id : ids) id = random.below(1 << 20);
          const int64_t* of = key == 77 ? ids.data() : nullptr;
          found.resize(candidates(x.data(), of, count, value[0], value[0] - 41.0, key, found.data()));
          hash.add(found);
          for (float temperature : {1.0f, 0.7f})
            for (int64_t top_k : {0, 1, 20, 300})
              for (double top_p : {1.0, 0.9, 0.5})
                for (double min_p : {0.0, 0.05})
                  hash.add(choose(x.data(), count, temperature, top_k, top_p, min_p, key));
        }
      print(hash, "best, candidates and sampled tokens %d of kind %d", int(count), what);
    }
}

void low_ranks(Random& random) {
  const auto run = function<int(const float*, const LowRank*, float*, int64_t, int64_t, int64_t, int)>(
      "specdec_low_rank");
  for (int64_t rank : {4, 8, 20})
    for (int64_t columns : {32, 45, 200})
      for (int64_t rows : {1, 3, 9}) {
        const int64_t outputs = 7 + 3 * columns;
        const Lower one(random, outputs, columns, rank, rows != 3);
        const std::vector<float> x = random.reals(rows * columns, 3);
        std::vector<float> y(rows * outputs);
        must(run(x.data(), &one.part, y.data(), rows, columns, outputs, int(rows)));
        Hash hash;
        hash.add(y);
        print(hash, "low rank %d of %d columns, rows %d", int(rank), int(columns), int(rows));
      }
}

void layers(Random& random) {
  const auto run = function<int(const Layer*, int64_t, const Span*, int64_t, const int64_t*, const int64_t*,
                                const KV* const*, const LayerAdapter* const*, const float*, float*, int64_t, int64_t,
                                const float*, int64_t, float* const*, int, int)>("specdec_layers");
  constexpr int64_t kHidden = Decoder::kHidden, kWidth = Decoder::kWidth, kSlots = 40;
  for (const Kind kind : kKinds)
    for (int64_t type : {kFloat32, kBfloat16, kInt8})
      for (int64_t count : {1, 3, 8, 17}) {
        const bool values_alone = count == 3 || count == 17;
        const Decoder one(random, kind, false, false), two(random, kind, true, values_alone);
        Layer both[2] = {one.layer, two.layer};
        both[1].store = 1;
        // two texts, of which the second begins in the middle
        const int64_t middle = count / 2, texts = middle ? 2 : 1, starts[3] = {0, middle ? middle : count, count};
        const int64_t positions[2] = {middle ? 50 : 3, 3};
        std::vector<Stored> kept;
        for (int i = 0; i < 4; ++i)
          kept.emplace_back(random, type, i % 2 == 0 || !values_alone, Decoder::kKvHeads, kSlots, kWidth, kWidth, 100);
        const KV first[2] = {kept[0].record(), kept[1].record()}, second[2] = {kept[2].record(), kept[3].record()};
        const KV* stores[2] = {first, second};
        std::vector<int64_t> low, high;
        for (int64_t r = 0; r < count; ++r) {
          const int64_t position = r < middle ? 50 + r : 3 + r - middle;
          high.push_back(position + 1);
          low.push_back(position > 20 ? position - 20 : 0);
        }
        std::vector<float> x = random.reals(count * kHidden, 3), aux(count * kHidden);
        const std::vector<float> cos = random.reals(count * kWidth), sin = random.reals(count * kWidth),
                                 last = random.reals(kHidden), extra = random.reals(count * 2 * Decoder::kExtra);
        const Span span{cos.data(), sin.data(), low.data(), high.data()};
        float* const wanted[2] = {aux.data(), nullptr};
        // the last text has an adapter, of the second layer alone
        constexpr int64_t kQueries = Decoder::kHeads * kWidth, kKeys = Decoder::kKvHeads * kWidth;
        const Lower q(random, kQueries, kHidden, 8, true), k(random, kKeys, kHidden, 4, false),
            v(random, kKeys, kHidden, 12, false), o(random, kHidden, kQueries, 4, true),
            gate(random, Decoder::kInner, kHidden, 4, false), up(random, Decoder::kInner, kHidden, 8, true),
            down(random, kHidden, Decoder::kInner, 4, false), more(random, Decoder::kExtra, kHidden, 4, true),
            projection(random, kHidden, Decoder::kExtra, 4, false);
        const LayerAdapter adapter[2] = {{},
                                         {q.part, k.part, v.part, o.part, gate.part, up.part, down.part, more.part,
                                          projection.part}};
        const LayerAdapter* adapters[2] = {nullptr, nullptr};
        adapters[texts - 1] = adapter;
        Hash hash;
        must(run(both, 2, &span, texts, starts, positions, stores, type == kInt8 ? nullptr : adapters, last.data(),
                 x.data(), count, kHidden, extra.data(), Decoder::kExtra, wanted, kAll, int(1 + count % 3)));
        hash.add(x), hash.add(aux);
        for (const Stored& store : kept) store.add_to(hash);
        print(hash, "layers %s %s rows %d", name_of(kind).c_str(), name_of(type),
              int(count));
      }
}

void drafts(Random& random) {
  const auto draft =
      function<int(const Drafter*, const Layer*, int64_t, const Span*, const KV* const*, const float*, float*, int64_t,
                   const float*, const float* const*, int64_t, int64_t, const DraftSampling*, const DraftChances*,
                   int64_t*, int64_t*, int)>("specdec_draft");
  constexpr int64_t kHidden = Decoder::kHidden, kWidth = 96, kTokens = 700, kSteps = 5;
  for (const Kind kind : kKinds)
    for (int how = 0; how < 4; ++how) {
      const Decoder decoder(random, kind, false, false, true);
      const Packed pre(random, kHidden, 2 * kWidth, kind), post(random, kWidth, kHidden, 8, false),
          head(random, 333, kHidden, kind), fuse(random, kWidth, 2 * kWidth, 4, true),
          embedding(random, kTokens, kWidth, kind);
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < head.outputs; ++i) ids.push_back(2 * i + 1);
      const Drafter drafter{pre.matrix(), post.matrix(), head.matrix(), how % 2 ? fuse.matrix() : Matrix{},
                            embedding.weights(), kTokens, how < 3 ? ids.data() : nullptr, 3.0f, 1e-6f, how % 2 ? 2 : 0};
      const Stored kept(random, kFloat32, true, Decoder::kKvHeads, 50, Decoder::kWidth, Decoder::kWidth, 0);
      const KV record = kept.record();
      const KV* stores[1] = {&record};
      const std::vector<float> cos = random.reals(Decoder::kWidth), sin = random.reals(Decoder::kWidth),
                               last = random.reals(kHidden, 2), state = random.reals(3 * kWidth, 2);
      const float* const others[2] = {state.data() + kWidth, state.data() + 2 * kWidth};
      const int64_t low = 60, high = 100;
      const Span span{cos.data(), sin.data(), &low, &high};
      const uint64_t keys[kSteps] = {5, 6, 7, 8, 9};
      const DraftSampling sampling{keys, 1.25f, how == 2 ? 40 : 0, how == 3 ? 0.8 : 1.0, how == 3 ? 0.001 : 0.0};
      std::vector<float> x(kHidden);
      std::vector<int64_t> tokens(kSteps);
      std::vector<float> shares(kSteps);
      const float floors[kSteps] = {};
      const DraftChances sure{shares.data(), floors, 1.25f};
      int64_t made = 0;
      Hash hash;
      must(draft(&drafter, &decoder.layer, 1, &span, stores, last.data(), x.data(), kHidden, state.data(), others, 17,
                 kSteps, how ? &sampling : nullptr, &sure, tokens.data(), &made, 1));
      must(made != kSteps);
      hash.add(tokens), hash.add(shares), hash.add(x);
      print(hash, "draft %s of kind %d", name_of(kind).c_str(), how);
    }
}

}  // namespace

int main(int count, char** arguments) {
  library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  const auto name = function<const char*(int)>("specdec_set_name");
  const auto use = function<int(const char*)>("specdec_use_set");
  int sets = 0;
  while (name(sets)) ++sets;
  const char* set = count > 2 ? arguments[2] : name(sets - 1);
  if (use(set)) {
    std::fprintf(stderr, "kernel_hashes: this CPU has no set %s\n", set);
    return 2;
  }
  std::printf("set %s\n", set);
  Random random(1);
  products(random);
  attentions(random);
  rows(random);
  choices(random);
  low_ranks(random);
  layers(random);
  drafts(random);
  return 0;
}
