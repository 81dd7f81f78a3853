// The threads that do the work of native.cpp.
//
// A pass over a model is hundreds of short steps, each cut into pieces that are claimed one by one from a counter. A
// slow core gets fewer pieces, a thread that the system has put aside holds up nothing that it has not claimed, and
// which thread does a piece never changes a result. That is why these are threads of our own: in torch's (OpenMP's)
// a step ends when every thread has come to its barrier, and with another process on one of two cores that is often
// a whole time slice later. Ours are started when they are first needed, as many as torch is told to use, and sleep
// between passes. Left out: Windows (everything runs on the caller's thread there).

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// A turn of a waiting loop: some microseconds of polling, which is what a step lasts, then the core is offered to
// whoever else wants it.
inline void wait_a_little([[maybe_unused]] int turn) {
#if !defined(_WIN32)
  if (turn > 1000) {
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
  static constexpr int kMost = 64;  // threads
  // Below this, in bytes touched or operations, a step stays on the caller's thread.
  static constexpr double kWorthSharing = 4e4;

  // A thread's part of a step. `left`, of the pieces that nobody has claimed: how many threads the step is for, the
  // first, and the one after the last. `next`: where the thread's part of a later step begins in memory, of which it
  // has asked for the first `asked` bytes while it waited.
  struct alignas(128) Share {
    std::atomic<uint64_t> left{0};
    alignas(64) std::atomic<const char*> next{nullptr};
    std::atomic<int64_t> bytes{0};
    const char* asking = nullptr;
    int64_t asked = 0;
  };

  explicit Team(Share* shares = nullptr) : share_(shares) {}
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
    while ((items + step_ - 1) / step_ > int64_t(kPieces)) step_ *= 2;
    const int64_t pieces = (items + step_ - 1) / step_;
    done_.store(0, std::memory_order_relaxed);
    for (int t = 0; t < threads_; ++t)
      share_[t].left.store(
          uint64_t(threads_) << 56 | uint64_t(pieces * t / threads_) << 28 | uint64_t(pieces * (t + 1) / threads_),
          std::memory_order_release);
    while (work(0)) {
    }
    for (int turn = 0; done_.load(std::memory_order_acquire) < pieces; ++turn)
      if (!ask(0)) wait_a_little(turn);
  }

  // The first of `items` that `thread` will be given by spread().
  int64_t first_of(int64_t items, int64_t step, int thread) const {
    return (items + step - 1) / step * thread / threads_ * step;
  }

  // A later step of `thread` reads `bytes` from `next` on: it may ask for them while it waits. Most steps between two
  // products are one thread's, and memory would lie idle.
  void expect(int thread, const void* next, int64_t bytes) {
    if (!share_) return;
    share_[thread].bytes.store(bytes < kAsked ? bytes : kAsked, std::memory_order_relaxed);
    share_[thread].next.store(static_cast<const char*>(next), std::memory_order_relaxed);
  }

 private:
  friend class Pool;
  static constexpr uint64_t kPieces = (1 << 28) - 1;
  static constexpr int64_t kAsked = 256 << 10;  // bytes: a part of the second-level cache

  // Prefetches a little of what is expected; false when there is nothing to ask for.
  bool ask(int thread) {
    if (!share_) return false;
    Share& s = share_[thread];
    const char* next = s.next.load(std::memory_order_relaxed);
    if (next != s.asking) {
      s.asking = next;
      s.asked = 0;
    }
    if (s.asked >= s.bytes.load(std::memory_order_relaxed)) return false;
    for (int i = 0; i < 8; ++i) __builtin_prefetch(next + s.asked + 64 * i, 0, 2);
    s.asked += 512;
    return true;
  }

  // Does one piece: the next of this thread's share, or else the last of another's. A share is a run of pieces, so
  // that a thread reads its weights in the order that they lie in memory. False when nothing is left. What the
  // fields below say belongs to whatever is claimed: they stay as they are until the last claimed piece is done.
  bool work(int thread) {
    const int threads = int(share_[thread].left.load(std::memory_order_acquire) >> 56);
    for (int i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& share = share_[(thread + i) % threads].left;
      uint64_t left = share.load(std::memory_order_acquire);
      while (thread < int(left >> 56) && (left >> 28 & kPieces) < (left & kPieces)) {
        const uint64_t piece = i == 0 ? left >> 28 & kPieces : (left & kPieces) - 1;
        if (!share.compare_exchange_weak(left, i == 0 ? left + (uint64_t(1) << 28) : left - 1,
                                         std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        const int64_t begin = int64_t(piece) * step_;
        call_(body_, begin, begin + step_ < items_ ? begin + step_ : items_, thread);
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  int threads_ = 1;
  void (*call_)(const void*, int64_t, int64_t, int) = nullptr;
  const void* body_ = nullptr;
  int64_t items_ = 0, step_ = 1;
  alignas(64) std::atomic<int64_t> done_{0};
  Share* const share_;
};

#if defined(_WIN32)

template <class Program>
void with_team(int, double, const Program& program) {
  Team alone;
  program(alone);
}

#else

// The threads of the process. They are never joined: between regions they hold nothing, and poll for `kPatience`
// turns before they sleep.
class Pool {
 public:
  // Starts a region with up to `threads` threads, the caller's included; null when another caller has them.
  Team* open(int threads) {
    if (busy_.exchange(true, std::memory_order_acquire)) return nullptr;
    threads = threads < Team::kMost ? threads : Team::kMost;
    while (started_ < threads - 1 && start()) {
    }
    team_.threads_ = threads < started_ + 1 ? threads : started_ + 1;
    running_.store(true, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      pthread_mutex_lock(&mutex_);
      pthread_cond_broadcast(&woken_);
      pthread_mutex_unlock(&mutex_);
    }
    return &team_;
  }

  void close() {
    running_.store(false, std::memory_order_release);
    busy_.store(false, std::memory_order_release);
  }

 private:
  static constexpr int kPatience = 2000;

  struct Start {
    Pool* pool;
    int thread;
  };

  bool start() {
    Start* start = static_cast<Start*>(std::malloc(sizeof(Start)));
    if (!start) return false;
    *start = Start{this, started_ + 1};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t id;
    const bool made = pthread_create(&id, &attributes, &Pool::main, start) == 0;
    pthread_attr_destroy(&attributes);
    if (made) {
      started_ += 1;
    } else {
      std::free(start);
    }
    return made;
  }

  static void* main(void* self) {
    const Start start = *static_cast<Start*>(self);
    std::free(self);
    start.pool->serve(start.thread);
    return nullptr;
  }

  void serve(int thread) {
    for (int turn = 0;; ++turn) {
      if (team_.work(thread)) {
        turn = 0;
      } else if (team_.ask(thread)) {
        continue;
      } else if (turn < kPatience || running_.load(std::memory_order_acquire)) {
        wait_a_little(turn);
      } else {
        pthread_mutex_lock(&mutex_);
        // counted before looking, so that a region that starts now either sees the sleeper or is seen by it
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        while (!running_.load(std::memory_order_seq_cst)) pthread_cond_wait(&woken_, &mutex_);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
        pthread_mutex_unlock(&mutex_);
        turn = 0;
      }
    }
  }

  Team::Share shares_[Team::kMost];
  Team team_{shares_};
  int started_ = 0;
  std::atomic<bool> busy_{false}, running_{false};
  std::atomic<int> sleeping_{0};
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t woken_ = PTHREAD_COND_INITIALIZER;
};

Pool* pool = nullptr;

// A forked child has none of its parent's threads: it starts its own. The parent's pool stays where it is, unused.
void make_pool() { pool = new Pool; }

// program(team) with a team of up to `threads`; alone where `cost` is too small to wake anybody.
template <class Program>
void with_team(int threads, double cost, const Program& program) {
  if (threads > 1 && cost >= 2e5) {
    static const bool made = [] {
      make_pool();
      return pthread_atfork(nullptr, nullptr, make_pool) == 0;
    }();
    Pool* const here = pool;
    if (Team* team = made ? here->open(threads) : nullptr) {
      program(*team);
      here->close();
      return;
    }
  }
  Team alone;
  program(alone);
}

#endif

}  // namespace
