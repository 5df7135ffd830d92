// Barriers among some of a CTA's warps (PTX bar.sync). Barrier 0 is __syncthreads().
#pragma once

namespace flash_mla::sm80 {

// `threads`: how many take part, whole warps.
__device__ __forceinline__ void sync_named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flash_mla::sm80
