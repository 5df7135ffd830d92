// Eight neighbouring columns of a packed token as bf16, on every architecture since sm_80.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "device/e2m1.cuh"
#include "device/scalar.h"

namespace flash_mla::mla_decode_sparse::portable {

__device__ __forceinline__ uint32_t bf16_pair(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Bit 7 of each byte: it is one of e4m3's two NaN codes.
__device__ __forceinline__ uint32_t e4m3_nans(uint32_t codes) {
  return ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

// ---- e4m3 with ue8m0 scales, quickly ------------------------------------------------------------
//
// Sign, exponent and mantissa of a code, moved to their places in a bf16, mean 2^-120 of its value:
// the exponents' biases are 7 and 127. One product with 2^120 times the scale makes up for both. It
// is exact (but where bf16 has no such small number). Not for NaN codes, and not for scales beyond
// kLargestQuickScale, with which the factor would exceed bf16.

inline constexpr uint32_t kLargestQuickScale = 254 - 120;

// 2^120 times the scale, as a pair of bf16.
__device__ __forceinline__ uint32_t ue8m0_factor(uint32_t scale) {
  return scale * 0x00800080u + 120u * 0x00800080u;
}

__device__ __forceinline__ uint4 e4m3_to_bf16(uint2 codes, uint32_t factor) {
  const auto pair = [&](uint32_t four, uint32_t select) {
    const uint32_t high = __byte_perm(four, 0, select);  // a code in the upper byte of each half
    const uint32_t bits = (high & 0x80008000u) | ((high >> 4) & 0x07f007f0u);
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                           reinterpret_cast<const __nv_bfloat162&>(factor));
    return reinterpret_cast<const uint32_t&>(product);
  };
  return make_uint4(pair(codes.x, 0x1404), pair(codes.x, 0x3424), pair(codes.y, 0x1404),
                    pair(codes.y, 0x3424));
}

// ---- any codes and scales -----------------------------------------------------------------------

__device__ __forceinline__ void e4m3_to_bf16_by_definition(uint2 codes, uint32_t scale,
                                                           uint16_t* columns) {
  const float factor = ue8m0_to_float(static_cast<uint8_t>(scale));
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = (i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 0xffu;
    columns[i] = float_to_bf16(e4m3_to_float(static_cast<uint8_t>(code)) * factor);
  }
}

// e2m1 with an e4m3 scale: products of at most 6 bits, exact.
__device__ __forceinline__ uint4 e2m1_to_bf16(uint32_t codes, uint8_t e4m3_scale) {
  const uint32_t s = e4m3_scale;
  float scale = bits_float((s & 0x80u) << 24 | (s & 0x7fu) << 20) * pow2(120);
  if ((s & 0x7fu) == 0x7fu) scale = bits_float(0x7fc00000u);
  float v[8];
  e2m1x4_to_floats(codes, v);
  e2m1x4_to_floats(codes >> 16, v + 4);
  return make_uint4(bf16_pair(v[0] * scale, v[1] * scale), bf16_pair(v[2] * scale, v[3] * scale),
                    bf16_pair(v[4] * scale, v[5] * scale), bf16_pair(v[6] * scale, v[7] * scale));
}

}  // namespace flash_mla::mla_decode_sparse::portable
