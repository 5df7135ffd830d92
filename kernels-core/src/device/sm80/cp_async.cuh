// Copies from global to shared memory that run beside the thread (PTX cp.async).
#pragma once

#include <cstdint>

namespace flash_mla::sm80 {

// An address of shared memory as the instructions of this folder take it.
__device__ __forceinline__ uint32_t smem_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// 16 bytes, past L1. Without `valid` nothing is read and zeros are written.
__device__ __forceinline__ void copy_16(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same for 4 bytes, by way of L1.
__device__ __forceinline__ void copy_4(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// And for 8.
__device__ __forceinline__ void copy_8(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// An arrival at an mbarrier, of those it counts, when all copies of this thread have landed.
__device__ __forceinline__ void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Returns when all but the `kPending` latest groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flash_mla::sm80
