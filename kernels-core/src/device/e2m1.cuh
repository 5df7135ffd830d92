// float4_e2m1 on every architecture, with the bits of scalar.h. Two codes a byte, the even-indexed
// one in the low nibble.
//
// Codes are found as a whole number. With h = |value / scale| / 2, the piecewise linear function
//
//   f(h) = 4 sat(h) + 2 sat(h - 1) + sat(h - 2)      sat(x): x clamped to [0, 1]
//
// takes the values 0 to 7 at the eight magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of e2m1 and is linear
// between neighbours, so that rounding it to the nearest whole number, ties to even, rounds to the
// nearest e2m1, ties to the even code. It is rounded once, where the terms are added to 2^23 (2^10
// in fp16): of the terms that are neither 0 nor at their limit there is at most one.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "device/scalar.h"

namespace flash_mla {

// Four magnitudes, a byte each, and four bytes whose bit 7 is the sign, as four nibbles: in bytes 0
// and 2, the others hold what is not needed.
__device__ __forceinline__ uint32_t pack_nibbles(uint32_t codes, uint32_t signs) {
  const uint32_t nibbles = codes | ((signs >> 4) & 0x08080808u);
  return nibbles | nibbles >> 4;
}

// Codes of value / scale for four float32: 16 bits. scale: positive, a normal e4m3.
__device__ __forceinline__ uint16_t floats_to_e2m1x4(const float* values, float scale) {
  // The quotient rounded as division rounds it: a correctly rounded reciprocal, then one correction
  // by the exact remainder.
  const float twice = 2.0f * scale;
  const float reciprocal = __frcp_rn(twice);
  uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float magnitude = fabsf(values[i]);
    const float estimate = magnitude * reciprocal;
    const float remainder = fmaf(-estimate, twice, magnitude);
    const float h = fminf(fmaf(remainder, reciprocal, estimate), 3.0f);  // NaN: 3, as it saturates
    constexpr float kTwoTo23 = 8388608.0f;
    const float upper = fmaf(2.0f, __saturatef(h - 1.0f), kTwoTo23) + __saturatef(h - 2.0f);
    sums[i] = float_bits(fmaf(4.0f, __saturatef(h), upper));
  }
  const uint32_t codes =
      __byte_perm(__byte_perm(sums[0], sums[1], 0x40), __byte_perm(sums[2], sums[3], 0x40), 0x5410);
  const uint32_t signs =
      __byte_perm(__byte_perm(float_bits(values[0]), float_bits(values[1]), 0x73),
                  __byte_perm(float_bits(values[2]), float_bits(values[3]), 0x73), 0x5410);
  return static_cast<uint16_t>(__byte_perm(pack_nibbles(codes, signs), 0, 0x20));
}

// The same for eight values that are bf16 or fp16: 32 bits, at less than half the cost. `pairs`
// holds them as they are, two a word, `values` as float32.
//
// fp16 is enough for h: the middle between two magnitudes times a scale has at most 7 significant
// bits, so a value of 11 bits or fewer that is not in the middle misses it by more than the
// rounding of h to fp16 moves it; and one that is in the middle stays there, since the errors of
// reciprocal and product (2^-21) are far below half a step of fp16.
__device__ __forceinline__ uint32_t halves_to_e2m1x8(const uint32_t* pairs, const float* values,
                                                     float scale) {
  const float reciprocal = __fdividef(0.5f, scale);
  const __half2 one = __half2half2(__ushort_as_half(0x3c00));
  const __half2 two = __half2half2(__ushort_as_half(0x4000));
  const __half2 three = __half2half2(__ushort_as_half(0x4200));
  const __half2 four = __half2half2(__ushort_as_half(0x4400));
  const __half2 two_to_10 = __half2half2(__ushort_as_half(0x6400));
  const __half2 zero = __half2half2(__ushort_as_half(0));
  uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 quotients =
        __floats2half2_rn(fabsf(values[2 * i]) * reciprocal, fabsf(values[2 * i + 1]) * reciprocal);
    const __half2 h = __hmin2(quotients, three);  // NaN: 3, as it saturates
    const __half2 upper = __hadd2(__hfma2(two, __hadd2_sat(h, __hneg2(one)), two_to_10),
                                  __hadd2_sat(h, __hneg2(two)));
    const __half2 sum = __hfma2(four, __hadd2_sat(h, zero), upper);
    sums[i] = reinterpret_cast<const uint32_t&>(sum);
  }
  const uint32_t low =
      pack_nibbles(__byte_perm(sums[0], sums[1], 0x6420), __byte_perm(pairs[0], pairs[1], 0x7531));
  const uint32_t high =
      pack_nibbles(__byte_perm(sums[2], sums[3], 0x6420), __byte_perm(pairs[2], pairs[3], 0x7531));
  return __byte_perm(low, high, 0x6420);
}

// Four codes, 16 bits, as float32.
__device__ __forceinline__ void e2m1x4_to_floats(uint32_t codes, float* values) {
  // The upper halves of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 as float32, looked up a byte
  // each.
  const uint32_t magnitudes = codes & 0x7777u;
  const uint32_t high = __byte_perm(0x3f3f3f00u, 0x40404040u, magnitudes);
  const uint32_t low = __byte_perm(0xc0800000u, 0xc0804000u, magnitudes);
  // Sign bits of the nibbles at bit 7 of a byte each.
  const uint32_t signs = __byte_perm(codes << 4, codes, 0x5140);
  const uint32_t signed_high = high | (signs & 0x80808080u);
  const uint32_t first = __byte_perm(low, signed_high, 0x5140);
  const uint32_t second = __byte_perm(low, signed_high, 0x7362);
  values[0] = bits_float(first << 16);
  values[1] = bits_float(first & 0xffff0000u);
  values[2] = bits_float(second << 16);
  values[3] = bits_float(second & 0xffff0000u);
}

}  // namespace flash_mla
