// Scratch memory: one allocation for a call, handed out in aligned parts.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

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
    const size_t bytes = size_t(count) * sizeof(T), room = (bytes + 63) & ~size_t(63);
    used_ += room + kGap;
#if defined(__SANITIZE_ADDRESS__)
    if (data_) ASAN_POISON_MEMORY_REGION(part + bytes, room - bytes + kGap);  // else parts would hide each other's ends
#endif
    return reinterpret_cast<T*>(part);
  }
  size_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGap = 64;
#else
  static constexpr size_t kGap = 0;
#endif
  char* data_;
  size_t used_ = 0;
};

}  // namespace
