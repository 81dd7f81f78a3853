// Threads and scratch memory for native.cpp.
//
// Threads are those of the OpenMP runtime that torch has already loaded, found by name and not linked: a second
// pool would fight the first for the cores. Without one, everything runs on the caller's thread. Work is claimed
// in small pieces from a counter, so that a slow core gets fewer; which thread does a piece never changes a
// result. Left out: Windows threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel find_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

const Parallel kParallel = find_parallel();

template <class Body>
struct Job {
  const Body& body;
  int64_t items, step;
  std::atomic<int64_t> next{0};
  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    for (;;) {
      const int64_t begin = job.next.fetch_add(job.step, std::memory_order_relaxed);
      if (begin >= job.items) return;
      job.body(begin, begin + job.step < job.items ? begin + job.step : job.items);
    }
  }
};

// body(begin, end) over 0..items, `step` at a time. `cost` is in bytes touched or operations, roughly: work that
// takes less than the few microseconds of waking a thread stays on this one.
template <class Body>
void spread(int64_t items, int64_t step, double cost, int threads, const Body& body) {
  if (threads <= 1 || !kParallel || items <= step || cost < 2e5) {
    if (items > 0) body(0, items);
    return;
  }
  Job<Body> job{body, items, step};
  kParallel(&Job<Body>::work, &job, unsigned(threads), 0);
}

// Freed at the end of the scope; null when there is no memory.
struct Scratch {
  void* raw;
  char* data;
  explicit Scratch(size_t bytes) : raw(std::malloc(bytes + 64)), data(nullptr) {
    if (raw) data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { std::free(raw); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
