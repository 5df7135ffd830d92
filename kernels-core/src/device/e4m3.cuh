// float8_e4m3 on every architecture, four at a time, with the bits of scalar.h (but those of a
// NaN's sign and payload).
#pragma once

#include <cstdint>

#include "device/scalar.h"
#include "device/sm89/e4m3.cuh"

namespace flash_mla {

// The first of four values goes to the low byte.
__device__ __forceinline__ uint32_t floats_to_e4m3x4(const float* values) {
#if __CUDA_ARCH__ >= 890
  const uint32_t low = sm89::floats_to_e4m3x2(values[0], values[1]);
  const uint32_t high = sm89::floats_to_e4m3x2(values[2], values[3]);
  return low | high << 16;
#else
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= uint32_t{float_to_e4m3(values[i])} << (8 * i);
  return codes;
#endif
}

__device__ __forceinline__ void e4m3x4_to_floats(uint32_t codes, float* values) {
#if __CUDA_ARCH__ >= 890
  const float2 low = __half22float2(sm89::e4m3x2_to_halves(static_cast<uint16_t>(codes)));
  const float2 high = __half22float2(sm89::e4m3x2_to_halves(static_cast<uint16_t>(codes >> 16)));
  values[0] = low.x;
  values[1] = low.y;
  values[2] = high.x;
  values[3] = high.y;
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = e4m3_to_float(static_cast<uint8_t>(codes >> (8 * i)));
#endif
}

}  // namespace flash_mla
