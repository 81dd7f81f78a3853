// The native kernels: a plain C interface over raw pointers, no torch headers, so that it compiles alone and does
// not depend on torch's version. Loaded by native.py through ctypes.
//
// This file is the interface: addresses and scratch memory. abi.h says what comes in, shapes.h what is passed
// around, steps.h and stack.h cut the work into pieces, tokens/ drafts tokens and chooses the sampled ones
// (draft.h, choice.h), threads.h says who does them, dispatch.h holds every instruction set and asks the CPU which
// it has, and the arithmetic is in isa/: quantise.inl, product.inl, rows.inl, store.inl and attention.inl, on the
// sixteen floats of simd.inl.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "dispatch.h"
#include "memory.h"
#include "shapes.h"
#include "stack.h"
#include "steps.h"
#include "threads.h"
#include "tokens/choice.h"
#include "tokens/draft.h"

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

// Which sources this was built from: what sources.py makes of them, handed over by setup.py.
#if !defined(SPECDEC_SOURCES_HASH)
#define SPECDEC_SOURCES_HASH "unknown"
#endif
API const char* specdec_sources_hash() { return SPECDEC_SOURCES_HASH; }

// Bytes of the record of abi.h with this name; -1: there is none.
API int64_t specdec_record_size(const char* name) {
  const struct {
    const char* name;
    size_t bytes;
  } records[] = {
#define RECORD(type) {#type, sizeof(type)}
      RECORD(Weights), RECORD(Matrix),  RECORD(LowRank),       RECORD(LayerAdapter), RECORD(Plane), RECORD(KV),
      RECORD(Mixture), RECORD(Layer),   RECORD(Span),          RECORD(Drafter),      RECORD(DraftSampling),
      RECORD(DraftChances),
#undef RECORD
  };
  for (const auto& record : records)
    if (!std::strcmp(record.name, name)) return int64_t(record.bytes);
  return -1;
}

// The name of the index-th instruction set that this CPU runs, the best last; null: there are no more.
API const char* specdec_set_name(int index) {
  const InstructionSet* set = usable_set(index);
  return set ? set->name : nullptr;
}

// Use the set of this name from now on. 1, and nothing changes, where this CPU runs none of that name.
API int specdec_use_set(const char* name) {
  for (int i = 0; const InstructionSet* set = usable_set(i); ++i) {
    if (std::strcmp(set->name, name)) continue;
    chosen = &set->kernels;
    return 0;
  }
  return 1;
}

API int specdec_has_threads() {
#if defined(_WIN32)
  return 0;
#else
  return 1;
#endif
}

// y [rows, outputs] = x [rows, columns] times packed weights [outputs, columns]. 1 when out of memory.
API int specdec_block_linear(const float* x, const Weights* w, float* y, int64_t rows, int64_t outputs, int threads) {
  const Matrix m{*w, nullptr, outputs};
  const int64_t columns = m.columns();
  Arena sizes;
  Activations(rows, columns, sizes);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return 1;
  Arena arena(scratch.data);
  const Activations activations(rows, columns, arena);
  with_team(threads, cost_of(m, rows), [&](Team& team) {
    activations.quantise(team, x, columns);
    const Product product{&m, y};
    multiply(team, activations, &product, 1);
  });
  return 0;
}

// y [rows, outputs] = a low-rank part of a matrix [outputs, columns] times x [rows, columns]. 1 when out of memory.
API int specdec_low_rank(const float* x, const LowRank* part, float* y, int64_t rows, int64_t columns, int64_t outputs,
                         int threads) {
  const Scratch scratch(sizeof(float) * size_t(rows * part->rank));
  if (!scratch.data) return 1;
  float* low = reinterpret_cast<float*>(scratch.data);
  std::memset(y, 0, sizeof(float) * size_t(rows * outputs));
  const int64_t chunks = part->rank / kRanks, groups = (outputs + 15) / 16;
  const double down = double(rows) * part->rank * columns, up = double(rows) * part->rank * outputs;
  with_team(threads, down + up, [&](Team& team) {
    team.spread(rows * chunks, 1, down, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % rows, rank = i / rows * kRanks;
        chosen->descend(*part, rank, columns, x + row * columns, low + row * part->rank + rank);
      }
    });
    team.spread(groups, piece_of(groups, team.threads()), up, [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; ++g)
        for (int64_t r = 0; r < rows; ++r)
          chosen->ascend(*part, g, low + r * part->rank, int(smaller(16, outputs - 16 * g)), y + r * outputs + 16 * g);
    });
  });
  return 0;
}

// Rows `ids` [rows] of packed weights [outputs, columns] as floats y [rows, columns]. 3 for an id that is no row.
API int specdec_block_rows(const int64_t* ids, const Weights* w, float* y, int64_t rows, int64_t outputs) {
  for (int64_t t = 0; t < rows; ++t)
    if (ids[t] < 0 || ids[t] >= outputs) return 3;
  for (int64_t t = 0; t < rows; ++t) chosen->unpack_row(*w, ids[t], y + t * 32 * w->blocks);
  return 0;
}

// reference.py's attention: q [rows, heads, width] to y [rows, heads, value width]. 1 when out of memory, 2 when a
// row sees more positions than there are slots.
API int specdec_attention(const float* q, const KV* store, const int64_t* first, const int64_t* end, float scale,
                          float* y, int64_t rows, int64_t heads, int64_t kv_heads, int threads) {
  Attention a{q, y, store, first, end, rows, heads, kv_heads, scale};
  if (!bounds_of(a)) return 2;
  Arena sizes;
  AttentionScratch(a, threads, sizes);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return 1;
  Arena arena(scratch.data);
  const AttentionScratch space(a, threads, arena);
  with_team(threads, cost_of(a), [&](Team& team) { attend(team, a, space); });
  return 0;
}

// x [rows, width] to y; weight [width] or null. 1 when out of memory.
API int specdec_rms_norm(const float* x, const float* weight, float eps, float* y, int64_t rows, int64_t width,
                         int threads) {
  const int64_t part = (width + 31) & ~int64_t(15);
  const Scratch scratch(sizeof(float) * size_t(part) * larger(1, threads));
  if (!scratch.data) return 1;
  float* space = reinterpret_cast<float*>(scratch.data);
  with_team(threads, double(rows) * width, [&](Team& team) {
    team.spread(rows, larger(1, 16384 / width), double(rows) * width, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t r = begin; r < end; ++r)
        chosen->norm(x + r * width, weight, width, eps, y + r * width, space + thread * part);
    });
  });
  return 0;
}

// x [rows, heads, width]; cos and sin [rows, width].
API int specdec_rope(const float* x, const float* cos, const float* sin, float* y, int64_t rows, int64_t heads,
                     int64_t width, int threads) {
  const int64_t row = heads * width;
  with_team(threads, double(rows) * row, [&](Team& team) {
    team.spread(rows, larger(1, 16384 / row), double(rows) * row, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t)
        chosen->rope_row(x + t * row, cos + t * width, sin + t * width, heads, width, y + t * row);
    });
  });
  return 0;
}

// gate and up [rows, width].
API int specdec_gated(const float* gate, const float* up, int gelu, float* y, int64_t rows, int64_t width,
                      int threads) {
  with_team(threads, double(rows) * width * 4, [&](Team& team) {
    team.spread(rows, larger(1, 8192 / width), double(rows) * width * 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r)
        chosen->gate_row(gate + r * width, up + r * width, width, gelu != 0, y + r * width);
    });
  });
  return 0;
}

// Index of the largest of x [count], count > 0; its value goes to *value.
API int64_t specdec_best(const float* x, int64_t count, float* value) { return chosen->best_of(x, count, value); }

// `ids` [count]: whose noise each score gets; null: 0 to count - 1.
API int64_t specdec_gumbel_candidates(const float* scores, const int64_t* ids, int64_t count, float top, double floor,
                               uint64_t key, int64_t* found) {
  return chosen->gumbel_candidates(scores, ids, count, top, floor, key, found);
}

// The token that is sampled from logits [count], or -1 where it takes transformers' warpers to tell: choice.h.
API int64_t specdec_sampled_token(const float* logits, int64_t count, float temperature, int64_t top_k, double top_p,
                                  double min_p, uint64_t key) {
  return sampled_token(logits, count, {temperature, top_k, top_p, min_p}, key);
}

// x [rows, hidden] through `count` decoder layers and a last norm of weight `final_norm` [hidden] or null, in place. The
// rows belong to `texts` texts, one after the other: those of text i begin at starts[i] and have the positions from
// positions[i] on, and Layer::store indexes stores[i]. `adapters`: of the texts, see Texts. `spans` are indexed by Layer::kind; `extra` [rows, count, extra
// width] or null; `aux`: see Stack; `work`: see Work. 1 when out of memory, 2 when a row sees more positions than a
// store has slots.
API int specdec_layers(const Layer* layers, int64_t count, const Span* spans, int64_t texts, const int64_t* starts,
                       const int64_t* positions, const KV* const* stores, const LayerAdapter* const* adapters,
                       const float* final_norm, float* x, int64_t rows, int64_t hidden, const float* extra,
                       int64_t extra_width, float* const* aux, int work, int threads) {
  Stack stack{layers, count,  spans, {texts, starts, positions, stores, adapters}, final_norm, x,
              rows,   hidden, extra, extra_width,                                  aux,        Work(work)};
  return stack.run(threads);
}

// `steps` tokens [steps] of a head with these layers; stores, spans and the rest are those of `specdec_layers` for one
// row, x [hidden] is scratch, `state` [the backbone's width] the state that chose `newest`, `aux` [Drafter::aux] the
// outputs of the layers that are fused with the state. `sampling`: how its tokens are sampled; null: they are not.
// `made`: how many tokens it has, fewer than `steps` where `sure` ends it. Codes: see draft.h.
API int specdec_draft(const Drafter* drafter, const Layer* layers, int64_t count, const Span* spans,
                      const KV* const* stores, const float* final_norm, float* x, int64_t hidden, const float* state,
                      const float* const* aux, int64_t newest, int64_t steps, const DraftSampling* sampling,
                      const DraftChances* sure, int64_t* tokens, int64_t* made, int threads) {
  const int64_t starts[2] = {0, 1};
  const Stack stack{layers, count, spans, {1, starts, nullptr, stores}, final_norm, x, 1, hidden, nullptr, 0, nullptr};
  return draft(*drafter, stack, state, aux, newest, steps, sampling, *sure, tokens, made, threads);
}
