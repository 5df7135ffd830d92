// float8_e4m3 by conversion instructions, which begin with sm_89.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace flash_mla::sm89 {

// Two floats, the first in the low byte. Rounds to nearest even and saturates at +-448; NaN is
// 0x7f.
__device__ __forceinline__ uint16_t floats_to_e4m3x2(float first, float second) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
}

// Two codes as fp16, the low byte first. Exact.
__device__ __forceinline__ __half2 e4m3x2_to_halves(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return reinterpret_cast<const __half2&>(halves);
}
// Four, as two pairs: the instruction reads the upper half of a register in place.
__device__ __forceinline__ void e4m3x4_to_halves(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 a, b;\n"
      "mov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\n"
      "cvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}

}  // namespace flash_mla::sm89
