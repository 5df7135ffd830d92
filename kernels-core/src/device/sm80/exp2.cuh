// 2^x by the special function unit (PTX ex2.approx).
#pragma once

namespace flash_mla::sm80 {

// Subnormal results are flushed to zero; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash_mla::sm80
