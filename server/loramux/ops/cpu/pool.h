// Threads of the native operations. Knows nothing of tensors.
//
// A region runs one function on all threads; `barrier` separates its phases. Waiting is a short spin, then a spin that
// offers its core, then a futex: regions which follow each other closely start in well under a microsecond, the thread
// that is waited for can run where the waiting one is, if others keep it from its own core, and an idle server sleeps.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace loramux {

inline void relax() { __builtin_ia32_pause(); }

class Pool {
 public:
  using Task = void (*)(void* argument, int thread, int threads);

  explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < threads_; ++i) std::thread([this, i] { work(i); }).detach();
  }

  int threads() const { return threads_; }

  // Runs task(argument, 0 … threads-1) and returns when all are done. One caller at a time.
  void run(Task task, void* argument) {
    if (threads_ == 1) {
      task(argument, 0, 1);
      return;
    }
    task_ = task;
    argument_ = argument;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    task(argument, 0, threads_);
    for (uint32_t left; (left = pending_.load(std::memory_order_acquire)) != 0;) wait(pending_, left);
  }

  // Within a region: returns when all threads have come here.
  void barrier() {
    if (threads_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads_)) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait(phase_, phase);
    }
  }

 private:
  static constexpr int kSpins = 100, kOffers = 1000;  // a microsecond or two, some hundreds of them

  static void wait(std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
    for (int i = 0; i < kOffers; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      sched_yield();
    }
    value.wait(old, std::memory_order_acquire);
  }

  void work(int thread) {
    uint32_t seen = 0;
    while (true) {
      uint32_t now;
      while ((now = epoch_.load(std::memory_order_acquire)) == seen) wait(epoch_, seen);
      seen = now;
      task_(argument_, thread, threads_);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  const int threads_;
  Task task_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> pending_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// [begin, end) of `count` items for one of `threads` threads, in multiples of `step`.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, int thread, int threads, int64_t step = 1) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t begin = steps * thread / threads * step, end = steps * (thread + 1) / threads * step;
  return {begin, end < count ? end : count};
}

}  // namespace loramux
