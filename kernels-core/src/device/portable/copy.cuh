// Copying a slab of 32 tokens to shared memory, as the cache has them.
#pragma once

#include <cstdint>

#include "device/portable/config.h"
#include "device/sm80/cp_async.cuh"
#include "device/warp.cuh"

namespace flash_mla::portable {

// The address of a token, which the lane of its number knows.
__device__ __forceinline__ const uint8_t* token_of_lane(const uint8_t* token, int lane) {
  return reinterpret_cast<const uint8_t*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(token), lane));
}

// By one warp, the keys of its group. `token`: the lane's; bits of valid_keys: which there are,
// zeros are written for the others. `tile`: the slab's, in shared memory.
template <class C>
__device__ __forceinline__ void copy_slab(const uint8_t* token, uint32_t valid_keys, uint32_t tile,
                                          int lane, int slab, int group) {
  using flash_mla::sm80::copy_16;
  constexpr int kGroupKeys = C::kGroupKeys;
  const auto is_valid = [&](int key) { return (valid_keys >> key & 1) != 0; };
  const int first = group * kGroupKeys;

  {  // 8 lanes copy 128 bytes of a key
    constexpr int kLanesPerKey = 8;
    const int part = lane % kLanesPerKey * 16;
#pragma unroll
    for (int i = 0; i < kGroupKeys * kLanesPerKey / kLanes; ++i) {
      const int key = first + i * (kLanes / kLanesPerKey) + lane / kLanesPerKey;
      const uint8_t* from = token_of_lane(token, key) + slab * C::kSlabBytes + part;
      const uint32_t to = tile + key * C::kRowBytes + part;
#pragma unroll
      for (int b = 0; b < C::kSlabBytes; b += kLanesPerKey * 16) {
        copy_16(to + b, from + b, is_valid(key));
      }
    }
  }
  if constexpr (C::kRope) {
    constexpr int kLanesPerKey = C::kSlabRopeBytes / 16;
    const int part = lane % kLanesPerKey * 16;
#pragma unroll
    for (int i = 0; i * kLanes < kGroupKeys * kLanesPerKey; ++i) {
      const int k = i * (kLanes / kLanesPerKey) + lane / kLanesPerKey;
      const int key = first + k % kGroupKeys;
      const uint8_t* from =
          token_of_lane(token, key) + C::kTokenRopeBytes + slab * C::kSlabRopeBytes + part;
      if (k < kGroupKeys) {
        copy_16(tile + key * C::kRowBytes + C::kSlabBytes + part, from, is_valid(key));
      }
    }
  }
  if constexpr (C::kTokenScales) {
    if (lane / kGroupKeys == group) {
      flash_mla::sm80::copy_4(tile + lane * C::kRowBytes + C::kScaleOffsetBytes,
                              token + C::kLayout.scales_offset_bytes + slab * 4, is_valid(lane));
    }
  }
}

}  // namespace flash_mla::portable
