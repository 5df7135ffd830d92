// Copies of tiles of tensors by the copy engine (PTX cp.async.bulk.tensor).
#pragma once

#include <cuda.h>

#include "device/sm90/mbarrier.cuh"

namespace flash_mla::sm90 {

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box of `map` at these coordinates to shared memory; its bytes complete on `full`.
__device__ __forceinline__ void load_tile(uint32_t smem, const CUtensorMap& map, int32_t c0,
                                          int32_t c1, int32_t c2, int32_t c3, int32_t c4,
                                          Barrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(smem),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(smem_address(&full))
      : "memory");
}

}  // namespace flash_mla::sm90
