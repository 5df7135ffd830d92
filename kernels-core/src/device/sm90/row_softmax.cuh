// The softmax of logits S^T[64 keys][rows] in the accumulators of a warpgroup: what a thread has of
// which row, sums over keys, and P^T as the next products' operand.
//
// With g = lane / 4, t = lane % 4 a thread has, of keys 16 warp + g and 8 on, rows 8 j + 2 t and
// one on: s[4 j + 2 half + e].
#pragma once

#include "device/sm90/fragments.cuh"
#include "device/sm90/mbarrier.cuh"
#include "device/sm90/warpgroup.cuh"

namespace flash_mla::sm90 {

// Below every logit that can occur, and finite: the first tile grows from it.
inline constexpr float kNoMaximum = -1e30f;

// Of a query row: the standing maximum of its logits in units of log2, and what q.k times gives
// them.
struct RowState {
  float max;
  float factor;
};

// Sums of a thread over the keys of its warp, after add_up_keys(), and the row of sum i. With 16
// rows two neighbours have the same.
template <int kRows>
inline constexpr int kRowSums = kRows < 32 ? 1 : kRows / 32;
template <int kRows>
__device__ __forceinline__ int sum_row(const Place& at, int i) {
  const int value = kRows == 64 ? 2 * at.g + i : kRows == 32 ? at.g : at.g / 2;
  return value / 2 * 8 + 2 * at.t + value % 2;
}

// Adds up the first `n` sums, [2 j + e] of a thread's keys, over the lanes of a t; each keeps a
// part of the rows.
template <int n, int kDistance = 16, int kValues>
__device__ __forceinline__ void add_up_keys(const Place& at, float (&sums)[kValues]) {
  if constexpr (n == 1) {
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], kDistance);
    if constexpr (kDistance > 4) add_up_keys<1, kDistance / 2>(at, sums);
  } else {
    const bool upper = at.lane & kDistance;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float kept = upper ? sums[i + n / 2] : sums[i];
      const float sent = upper ? sums[i] : sums[i + n / 2];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, sent, kDistance);
    }
    if constexpr (kDistance > 4) add_up_keys<n / 2, kDistance / 2>(at, sums);
  }
}

// Whether it is so in some thread of a warpgroup, which has this hardware barrier.
__device__ __forceinline__ bool any_in_warpgroup(int barrier, bool mine) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(mine)), "r"(barrier), "n"(kWarpgroup)
      : "memory");
  return any != 0;
}

// P^T in the place of 64 keys for each row, K-major with the 128-byte swizzle. `words(i)`: 16-bit
// values of s[2 i] and s[2 i + 1]. For the products, a fence of the async proxy must follow.
template <int kRows, class Words>
__device__ __forceinline__ void store_p(const Place& at, uint8_t* p, const Words& words) {
  // A matrix is eight rows of P^T and eight of the warp's keys; lane i addresses row i % 8.
  const uint32_t to = smem_address(p) + (at.lane / 16 * 8 + at.lane % 8) * 128 +
                      (((2 * at.warp + at.lane / 8 % 2) ^ at.lane % 8) << 4);
#pragma unroll
  for (int j = 0; j < kRows / 8; j += 2) {
    uint32_t matrices[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) matrices[i] = words(2 * j + i);
    store_matrices_transposed(to + j * (8 * 128), matrices);
  }
}

}  // namespace flash_mla::sm90
