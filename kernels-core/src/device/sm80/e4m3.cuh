// float8_e4m3 to bf16, four at a time, without a conversion instruction (those begin with sm_89).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace flash_mla::sm80 {

// Bytes 0 and 2 of `codes` as a pair of bf16, the first in the low half, and bytes 1 and 3.
//
// Sign, exponent and mantissa of a code, moved to their places in a bf16, mean 2^-120 of its value:
// the exponents' biases are 7 and 127. The product with 2^120 is exact, for subnormals too. The two
// NaN codes become +-480: nothing that is finite elsewhere becomes NaN here, nor the other way
// round.
__device__ __forceinline__ void e4m3_to_bf16(uint32_t codes, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t kSigns = 0x80008000u;
  constexpr uint32_t kMagnitudes = 0x07f007f0u;
  const uint32_t even_bits = ((codes << 8) & kSigns) | ((codes << 4) & kMagnitudes);
  const uint32_t odd_bits = (codes & kSigns) | ((codes >> 4) & kMagnitudes);
  constexpr uint32_t kTwoTo120 = 0x7b807b80u;
  const auto scaled = [](uint32_t bits) {
    const uint32_t factor = kTwoTo120;
    const __nv_bfloat162 pair = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                        reinterpret_cast<const __nv_bfloat162&>(factor));
    return reinterpret_cast<const uint32_t&>(pair);
  };
  even = scaled(even_bits);
  odd = scaled(odd_bits);
}

}  // namespace flash_mla::sm80
