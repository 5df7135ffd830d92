// Transaction barriers in shared memory (PTX mbarrier), and the orderings they need.
#pragma once

#include <cstdint>

#include "device/warp.cuh"

namespace flash_mla::sm90 {

using Barrier = uint64_t;

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// By the thread that has initialised barriers, before the CTA's barrier: the copy engine sees them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

// One arrival for the warp, whose lanes have all come this far.
__device__ __forceinline__ void arrive_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % kLanes == 0) arrive(barrier);
  __syncwarp();
}

// Announces bytes of copies that will complete on the barrier's phase.
__device__ __forceinline__ void expect(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// An arrival that also announces bytes of copies that will complete on the barrier.
__device__ __forceinline__ void arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool try_wait(const Barrier& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(smem_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Until the phase of this parity has completed. FLASH_MLA_BOUNDED_WAITS, for debugging, goes on
// after a second, with wrong results in place of a hang. (No trap: ptxas drops setmaxnreg from a
// kernel that can exit in the middle, and spills.)
__device__ __forceinline__ void wait(const Barrier& barrier, uint32_t parity) {
#ifdef FLASH_MLA_BOUNDED_WAITS
  for (int64_t start = clock64(); !try_wait(barrier, parity) && clock64() - start < (1ll << 31);) {
  }
#else
  while (!try_wait(barrier, parity)) {
  }
#endif
}

// Generic writes of shared memory by this thread come before later accesses of it by the tensor
// cores and the copy engine; a barrier must still follow.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A hardware barrier over part of a CTA; 0 is __syncthreads().
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as an arrival at it, without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flash_mla::sm90
