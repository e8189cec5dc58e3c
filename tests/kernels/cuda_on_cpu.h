// The functions of megatron_moe/kernels/cuda/bulk.cuh for a CPU: a thread is a thread, blocks run one after another. Copies behave as badly as they may:
// a bulk load lands at once, a bulk store reads its shared memory as late as the waits of its thread allow. So a slot that is filled
// again too early sends what it should not, and a store that nobody waited for is never seen.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) char* name = block->shared.data()
#define LAUNCH(kernel, grid, threads, bytes, stream, ...) run_blocks(grid, threads, bytes, [=] { kernel(__VA_ARGS__); })
using std::min;
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  int x;
};
struct Block {
  std::vector<char> shared;
  pthread_barrier_t all;
  std::vector<pthread_barrier_t> warps;
};
struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};
static thread_local Block* block;
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
static thread_local std::deque<std::vector<Copy>> groups;  // of this thread, the oldest first; the last one is open
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}
inline int cudaGetLastError() { return 0; }

inline void __syncthreads() { pthread_barrier_wait(&block->all); }
inline void __syncwarp() { pthread_barrier_wait(&block->warps[threadIdx.x / 32]); }

inline void run_blocks(int grid, int threads, size_t bytes, std::function<void()> kernel) {
  for (int b = 0; b < grid; b++) {
    Block here;
    here.shared.resize(bytes);
    here.warps.resize(threads / 32);
    pthread_barrier_init(&here.all, nullptr, threads);
    for (auto& warp : here.warps) pthread_barrier_init(&warp, nullptr, 32);
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++) {
      all.emplace_back([&, t] {
        block = &here, threadIdx = {t}, blockIdx = {b}, blockDim = {threads}, gridDim = {grid};
        groups.assign(1, {});
        kernel();
      });
    }
    for (auto& thread : all) thread.join();
  }
}

struct bf16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float wide(__half x) { return (float)x.value; }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) {  // to the nearest, ties to even; no NaN comes here
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y.bits = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, __half& y) { y.value = (_Float16)x; }

// [parity:1][arrivals wanted:15][arrivals missing:16][bytes missing:32]; announced bytes count as missing until they have landed
struct Phase {
  uint64_t parity : 1, wanted : 15, missing : 16;
  int64_t bytes : 32;
};
static std::mutex lock;
inline void change(uint64_t* barrier, int arrivals, int64_t bytes) {
  std::lock_guard<std::mutex> held(lock);
  Phase p;
  memcpy(&p, barrier, 8);
  p.missing -= arrivals;
  p.bytes += bytes;
  if (p.missing == 0 && p.bytes == 0) p.parity ^= 1, p.missing = p.wanted;
  memcpy(barrier, &p, 8);
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  Phase p{0, (uint64_t)arrivals, (uint64_t)arrivals, 0};
  memcpy(barrier, &p, 8);
}
inline void barriers_ready() {}
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) { change(barrier, 1, bytes); }
inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {  // that the phase of this parity has ended
  for (;;) {
    {
      std::lock_guard<std::mutex> held(lock);
      Phase p;
      memcpy(&p, barrier, 8);
      if (p.parity != parity) return;
    }
    std::this_thread::yield();
  }
}
inline void load_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  memcpy(to, from, bytes);
  change(barrier, 0, -(int64_t)bytes);
}
inline void store_bulk(void* to, const void* from, uint32_t bytes) { groups.back().push_back({(char*)to, (const char*)from, bytes}); }
inline void close_group() { groups.emplace_back(); }
inline void finish_groups(size_t but) {
  while (groups.size() > but + 1) {  // the open one stays
    for (auto& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.pop_front();
  }
}
template <int N>
void wait_until_read() {
  finish_groups(N);
}
inline void wait_until_written() { finish_groups(0); }
inline void fence_copies() {}
inline void fence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int add_acq_rel(int* p, int n) { return __atomic_fetch_add(p, n, __ATOMIC_ACQ_REL); }
inline void store_release(int* p, int n) { __atomic_store_n(p, n, __ATOMIC_RELEASE); }
inline int load_acquire(const int* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
