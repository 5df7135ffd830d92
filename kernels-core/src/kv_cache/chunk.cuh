// A lane's share of a token: 16 bytes of kv, and the same columns as the cache has them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/scalar.h"
#include "flash_mla/types.h"

namespace flash_mla::kv_cache {

// That many bytes, read and written at once.
template <int kBytes>
struct alignas(kBytes) Bytes {
  uint32_t words[kBytes / 4];
};
template <>
struct alignas(2) Bytes<2> {
  uint16_t words[1];
};

template <int kBytes>
__device__ __forceinline__ Bytes<kBytes> load_bytes(const uint8_t* source) {
  return *reinterpret_cast<const Bytes<kBytes>*>(source);
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* target, const Bytes<kBytes>& bytes) {
  *reinterpret_cast<Bytes<kBytes>*>(target) = bytes;
}

inline constexpr int kChunkBytes = 16;

template <DType kType>
inline constexpr int kElementBytes = kType == DType::kFloat32 ? 4 : 2;

// The elements of bf16, fp16 or float32 as float32.
template <DType kType, int kBytes>
__device__ __forceinline__ void unpack(const Bytes<kBytes>& bytes, float* values) {
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    const uint32_t word = bytes.words[i];
    if constexpr (kType == DType::kFloat32) {
      values[i] = bits_float(word);
    } else if constexpr (kType == DType::kBFloat16) {
      values[2 * i] = bits_float(word << 16);
      values[2 * i + 1] = bits_float(word & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// NaN if one of the values is NaN or infinite, else 0.
template <int kCount>
__device__ __forceinline__ float nan_sum(const float* values) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum = fmaf(values[i], 0.0f, sum);
  return sum;
}

// Rounds to bf16 or fp16, or keeps float32. NaN is canonical_nan's, not the instructions'.
template <DType kType, int kCount>
__device__ __forceinline__ Bytes<kCount * kElementBytes<kType>> pack(const float* values) {
  Bytes<kCount * kElementBytes<kType>> bytes;
  constexpr int kWords = kCount * kElementBytes<kType> / 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kType == DType::kFloat32) {
      bytes.words[i] = float_bits(values[i]);
    } else if constexpr (kType == DType::kBFloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      bytes.words[i] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      bytes.words[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  if (is_nan(nan_sum<kCount>(values))) {  // seldom
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kType == DType::kFloat32) {
        bytes.words[i] = float_bits(canonical_nan(values[i]));
      } else {
        constexpr uint32_t kNan = kType == DType::kBFloat16 ? 0x7fc0u : 0x7e00u;
        uint32_t& word = bytes.words[i];
        if (is_nan(values[2 * i])) word = (word & 0xffff0000u) | kNan;
        if (is_nan(values[2 * i + 1])) word = (word & 0xffffu) | kNan << 16;
      }
    }
  }
  return bytes;
}

}  // namespace flash_mla::kv_cache
