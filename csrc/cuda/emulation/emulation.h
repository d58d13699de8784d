// Runs the kernels on a CPU: the threads of a block are fibers, and every barrier, shuffle and
// vote is a place where a fiber waits for the others. Included by device.cuh in place of CUDA.
// OPD_EMULATION_ORDER=reverse runs the threads from last to first: kernels that forget a barrier
// give other results then. A barrier that some threads never reach ends the program.
#pragma once

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t a = 1, int64_t b = 1, int64_t c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Fiber {
  std::unique_ptr<char[]>
      stack;  // made at the first use, then the fiber runs one block after another
  jmp_buf place;
  bool done;
  int parity;  // which slots a lane uses next
};

struct Machine {
  dim3 grid, block_index, thread_index;
  int threads = 0, current = 0;
  long progress = 0;  // barriers passed and threads ended: none in a whole turn is a deadlock
  jmp_buf scheduler;
  std::vector<Fiber> fibers = std::vector<Fiber>(1024);
  Barrier block, warps[32];
  uint64_t slots[2][1024], dynamic[16 * 1024];
  std::function<void()> kernel;
  std::mutex one_at_a_time;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

// Fibers change places by longjmp, which unlike swapcontext makes no system call.
inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.fibers[m.current].place) == 0) _longjmp(m.scheduler, 1);
}

inline void fiber() {
  for (Machine& m = machine();;) {
    m.kernel();
    m.fibers[m.current].done = true;
    ++m.progress;
    yield();
  }
}

inline void resume(Fiber& f) {
  Machine& m = machine();
  if (_setjmp(m.scheduler) != 0) return;
  if (f.stack) _longjmp(f.place, 1);
  f.stack = std::make_unique<char[]>(kStack);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = f.stack.get();
  start.uc_stack.ss_size = kStack;
  makecontext(&start, fiber, 0);
  setcontext(&start);
}

inline void wait(Barrier& barrier, int size) {
  Machine& m = machine();
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++m.progress;
    return;
  }
  for (const long before = barrier.generation; barrier.generation == before;) yield();
}

inline void sync_warp() {
  Machine& m = machine();
  const int warp = m.current / 32;
  wait(m.warps[warp], std::min(32, m.threads - 32 * warp));
}

// Two sets of slots in turn: a fast lane may write the next value before a slow one has read.
template <class V>
V shuffle_xor(V value, int offset) {
  static_assert(sizeof(V) <= 8);
  Machine& m = machine();
  uint64_t* slots = m.slots[m.fibers[m.current].parity ^= 1];
  std::memcpy(&slots[m.current], &value, sizeof value);
  sync_warp();
  std::memcpy(&value, &slots[m.current ^ offset], sizeof value);
  return value;
}

inline void run_block() {
  Machine& m = machine();
  const char* order = std::getenv("OPD_EMULATION_ORDER");
  const bool reverse = order != nullptr && std::string(order) == "reverse";
  for (int i = 0; i < m.threads; ++i) m.fibers[i].done = false;
  std::memset(m.dynamic, 0xff, sizeof m.dynamic);  // NaN: nothing is set to 0 here
  for (int left = m.threads; left > 0;) {
    const long before = m.progress;
    for (int i = 0; i < m.threads; ++i) {
      m.current = reverse ? m.threads - 1 - i : i;
      if (m.fibers[m.current].done) continue;
      m.thread_index.x = m.current;
      resume(m.fibers[m.current]);
      left -= m.fibers[m.current].done;
    }
    if (m.progress == before) {
      std::fprintf(stderr, "emulation: some threads never reach a barrier\n");
      std::abort();
    }
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int threads, int64_t shared, const Args&... args) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_at_a_time);
  if (threads > 1024 || shared > static_cast<int64_t>(sizeof m.dynamic)) std::abort();
  m.grid = grid;
  m.threads = threads;
  m.thread_index = dim3(0, 0, 0);
  m.kernel = [&] { kernel(args...); };
  for (m.block_index.y = 0; m.block_index.y < grid.y; ++m.block_index.y)
    for (m.block_index.x = 0; m.block_index.x < grid.x; ++m.block_index.x) run_block();
}

inline float half_to_float(uint16_t bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }
inline uint16_t float_to_half(float x) { return c10::detail::fp16_ieee_from_fp32_value(x); }
inline float bfloat16_to_float(uint16_t bits) { return c10::detail::f32_from_bits(bits); }
inline uint16_t float_to_bfloat16(float x) { return c10::detail::round_to_nearest_even(x); }

}  // namespace emulation

#define threadIdx (emulation::machine().thread_index)
#define blockIdx (emulation::machine().block_index)
#define OPD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), emulation::launch(kernel, grid, block, shared, __VA_ARGS__))
#define OPD_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulation::machine().dynamic)

inline void __syncthreads() {
  emulation::wait(emulation::machine().block, emulation::machine().threads);
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int offset) {
  return emulation::shuffle_xor(value, offset);
}
template <class V>
V atomicAdd(V* at, V value) {
  const V before = *at;
  *at += value;
  return before;
}
template <class V>
V atomicOr(V* at, V value) {
  const V before = *at;
  *at |= value;
  return before;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
