// What ThreadSanitizer watches (.ci/sanitize): the kernels' threads as a process uses them. Several callers at once, of
// whom one has the threads and the others work alone; numbers of threads that go up and down; steps so short that a
// region ends before every thread has seen it; sleep in between. Exits with 1 where a result is another one than that of
// one thread. Left out: a fork, after which ThreadSanitizer starts no threads (tests/kernels/test_threads.py has it).

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../../specdec/kernels/csrc/native.cpp"

namespace {

constexpr int64_t kRows = 5, kColumns_ = 256, kOutputs = 1024;

// A product that is worth sharing, and rows that go through shared steps of their own.
struct Sums {
  std::vector<uint8_t> q;
  std::vector<uint16_t> scale;
  std::vector<float> x, product, normed;

  Sums() : q(kOutputs * kColumns_ / 2), scale(kOutputs * kColumns_ / 32, 0x2e66), x(kRows * kColumns_) {
    unsigned state = 1;
    const auto next = [&] { return state = state * 1664525u + 1013904223u, state >> 24; };
    for (uint8_t& value : q) value = uint8_t(next());
    for (float& value : x) value = float(next()) / 64 - 2;
    run(1, product, normed);
  }

  void run(int threads, std::vector<float>& y, std::vector<float>& z) const {
    y.assign(kRows * kOutputs, 0);
    z.assign(kRows * kOutputs, 0);
    const Weights w{q.data(), scale.data(), nullptr, nullptr, nullptr, kColumns_ / 32, 4, 1.0};
    int code = specdec_block_linear(x.data(), &w, y.data(), kRows, kOutputs, threads);
    code |= specdec_rms_norm(y.data(), nullptr, 1e-6f, z.data(), kRows * kOutputs / 64, 64, threads);
    if (code) std::abort();
  }

  bool same(int turns, int most) const {
    std::vector<float> y, z;
    for (int turn = 0; turn < turns; ++turn) {
      run(1 + turn % most, y, z);
      if (y != product || z != normed) return false;
    }
    return true;
  }
};

// Several steps in one region, as a pass over layers has them, with the next one's memory asked for meanwhile.
bool counts(int turns) {
  for (int turn = 0; turn < turns; ++turn) {
    int64_t sums[Team::kMost] = {}, total = 0;
    with_team(4, 1e9, [&](Team& team) {
      for (int64_t step = 1; step <= 16; ++step) {
        for (int thread = 0; thread < team.threads(); ++thread) team.expect(thread, sums, sizeof(sums));
        team.spread(100 + step, step, 1e9, [&](int64_t begin, int64_t end, int thread) { sums[thread] += end - begin; });
      }
    });
    for (int64_t sum : sums) total += sum;
    if (total != 16 * 100 + 16 * 17 / 2) return false;
  }
  return true;
}

}  // namespace

int main() {
  const Sums work;
  bool right = counts(50);
  std::vector<char> found(4);
  std::vector<std::thread> callers;
  for (size_t i = 0; i < found.size(); ++i)
    callers.emplace_back([&, i] { found[i] = work.same(60, 4) && counts(10); });
  for (std::thread& caller : callers) caller.join();
  for (char one : found) right = right && one;
  usleep(200000);  // long enough that every thread sleeps
  right = right && work.same(10, 3);
  std::printf("kernel threads: %s\n", right ? "right" : "WRONG");
  return right ? 0 : 1;
}
