// Warpgroups, and what a CTA of sm_90 can have.
#pragma once

#include <cstdint>

#include "device/warp.cuh"

namespace flash_mla::sm90 {

inline constexpr int kWarpgroup = 128;  // threads
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kMaxSmemBytes = 232448;  // of a block

// A value that all lanes have anyway, as the compiler sees it: branches on it keep addresses in
// uniform registers, and each wgmma then costs 5 instructions, not 13.
template <class T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(kAllLanes, value, 0);
}

// The thread's number, read anew: what is computed from it is cheap, and shall not occupy registers
// from one piece of work to the next.
__device__ __forceinline__ int this_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread);
}

// A thread's place in its warpgroup, and in a quarter of eight rows of an operand or accumulators.
struct Place {
  int warp, lane, g, t;

  __device__ __forceinline__ Place() {
    const auto thread = static_cast<unsigned>(this_thread());
    warp = thread % kWarpgroup / kLanes;
    lane = thread % kLanes;
    g = lane / 4;
    t = lane % 4;
  }
};

}  // namespace flash_mla::sm90
