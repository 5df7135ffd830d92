// Copies of contiguous bytes from global to shared memory by the copy engine (PTX cp.async.bulk).
#pragma once

#include "device/sm90/mbarrier.cuh"

namespace flash_mla::sm90 {

// `bytes`, addresses: multiples of 16. The bytes complete on `full`, which must expect them.
__device__ __forceinline__ void copy_bulk(void* smem, const void* global, uint32_t bytes,
                                          Barrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(smem)),
      "l"(global), "r"(bytes), "r"(smem_address(&full))
      : "memory");
}

// Brings the line that has this byte to L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

}  // namespace flash_mla::sm90
