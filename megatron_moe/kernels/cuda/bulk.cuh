// Hopper's bulk copies, barriers and signals, each as one function. tests/kernels/cuda_on_cpu.h has the same functions for a CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
#define LAUNCH(kernel, grid, threads, bytes, stream, ...) kernel<<<grid, threads, bytes, (cudaStream_t)(stream)>>>(__VA_ARGS__)

using bf16 = __nv_bfloat16;
DEVICE float wide(float x) { return x; }
DEVICE float wide(bf16 x) { return __bfloat162float(x); }
DEVICE float wide(__half x) { return __half2float(x); }
DEVICE void narrow(float x, float& y) { y = x; }
DEVICE void narrow(float x, bf16& y) { y = __float2bfloat16_rn(x); }
DEVICE void narrow(float x, __half& y) { y = __float2half_rn(x); }

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// A barrier in shared memory: a phase ends when `arrivals` threads have arrived and all bytes that they announced have landed.
DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Behind barrier_init, before any copy is started.
DEVICE void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
DEVICE void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Global memory, of any GPU, to shared memory: multiples of 16 bytes at addresses that are.
DEVICE void load_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// Shared memory to global memory, of any GPU, in the open group of this thread.
DEVICE void store_bulk(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all groups of this thread but the last N have read their shared memory.
template <int N>
DEVICE void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until all stores of this thread have been written.
DEVICE void wait_until_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Between what bulk copies and what plain instructions do to the same memory.
DEVICE void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }
DEVICE void fence_system() { __threadfence_system(); }

DEVICE int add_acq_rel(int* p, int n) {
  int before;
  asm volatile("atom.acq_rel.sys.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(n) : "memory");
  return before;
}
DEVICE void store_release(int* p, int n) { asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(p), "r"(n) : "memory"); }
DEVICE int load_acquire(const int* p) {
  int n;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(n) : "l"(p) : "memory");
  return n;
}
