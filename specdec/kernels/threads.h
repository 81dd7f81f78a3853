// Threads and scratch memory for native.cpp.
//
// Threads are those of the OpenMP runtime that torch has already loaded, found by name and not linked: a second
// pool would fight the first for the cores, and this one sleeps when nothing is to do. Without it everything runs
// on the caller's thread.
//
// A pass over a model is hundreds of short steps, and a parallel region for each would cost more than the small
// steps take. So a Team is one region: the caller runs the program, the others serve it. A step is cut into pieces
// that are claimed one by one from a counter; a slow core gets fewer, a thread that the system has put aside holds
// up nothing that it has not claimed, and which thread does a piece never changes a result. Left out: Windows
// threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
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

// A turn of a waiting loop: a few microseconds of polling, which is what a step lasts, then the core is offered to
// whoever else wants it.
inline void wait_a_little(int turn) {
#if !defined(_WIN32)
  if (turn > 2000) {
    sched_yield();
    return;
  }
#endif
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Team {
 public:
  // Below this, in bytes touched or operations, a step stays on the caller's thread.
  static constexpr double kWorthSharing = 4e4;

  explicit Team(int threads) : threads_(threads) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // body(begin, end, thread) over 0..items, `step` at a time; `thread` < threads() is whose scratch to use. Returns
  // when all of it is done.
  template <class Body>
  void spread(int64_t items, int64_t step, double cost, const Body& body) {
    if (items <= 0) return;
    if (threads_ <= 1 || items <= step || cost < kWorthSharing) {
      body(int64_t(0), items, 0);
      return;
    }
    call_ = [](const void* self, int64_t begin, int64_t end, int thread) {
      (*static_cast<const Body*>(self))(begin, end, thread);
    };
    body_ = &body;
    items_ = items;
    step_ = step;
    pieces_ = (items + step - 1) / step;
    done_.store(0, std::memory_order_relaxed);
    phase_ += 1;
    open_.store(phase_ << 32 | uint64_t(pieces_), std::memory_order_release);
    while (work(0)) {
    }
    for (int turn = 0; done_.load(std::memory_order_acquire) < pieces_; ++turn) wait_a_little(turn);
  }

  // What the other threads do until the program ends.
  void serve(int thread) {
    for (int turn = 0;; ++turn) {
      if (work(thread)) {
        turn = 0;
      } else if (over_.load(std::memory_order_acquire)) {
        return;
      } else {
        wait_a_little(turn);
      }
    }
  }

  void end() { over_.store(true, std::memory_order_release); }

 private:
  // Claims one piece and does it; false when there is none. The step's number is part of the counter, so a claim is
  // never of a step that has ended, and the fields below stay as they are until the claimed piece is done.
  bool work(int thread) {
    uint64_t open = open_.load(std::memory_order_acquire);
    do {
      if (uint32_t(open) == 0) return false;
    } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    const int64_t begin = (pieces_ - int64_t(uint32_t(open))) * step_;
    call_(body_, begin, begin + step_ < items_ ? begin + step_ : items_, thread);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  const int threads_;
  uint64_t phase_ = 0;
  void (*call_)(const void*, int64_t, int64_t, int) = nullptr;
  const void* body_ = nullptr;
  int64_t items_ = 0, step_ = 1, pieces_ = 0;
  std::atomic<bool> over_{false};
  alignas(64) std::atomic<uint64_t> open_{0};  // number of the step, pieces that nobody has claimed
  alignas(64) std::atomic<int64_t> done_{0};
};

template <class Program>
struct Region {
  const Program& program;
  Team& team;
  const std::atomic<bool>* caller;  // an address in the caller's own thread
  std::atomic<int> joined{1};
  static std::atomic<bool>* here() {
    static thread_local std::atomic<bool> mark{false};
    return &mark;
  }
  static void enter(void* self) {
    Region& region = *static_cast<Region*>(self);
    if (here() == region.caller) {
      region.program(region.team);
      region.team.end();
    } else {
      region.team.serve(region.joined.fetch_add(1));
    }
  }
};

// program(team) with a team of up to `threads`; alone where `cost` is too small to wake anybody.
template <class Program>
void with_team(int threads, double cost, const Program& program) {
  if (threads <= 1 || !kParallel || cost < 2e5) {
    Team alone(1);
    program(alone);
    return;
  }
  Team team(threads);
  Region<Program> region{program, team, Region<Program>::here()};
  kParallel(&Region<Program>::enter, &region, unsigned(threads), 0);
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

// Hands out aligned parts of one allocation: first add up, then take.
class Arena {
 public:
  explicit Arena(char* data = nullptr) : data_(data) {}
  template <class T>
  T* take(int64_t count) {
    char* part = data_ + used_;
    used_ += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    return reinterpret_cast<T*>(part);
  }
  size_t used() const { return used_; }

 private:
  char* data_;
  size_t used_ = 0;
};

}  // namespace
