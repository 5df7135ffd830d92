// Number formats of caches and tensors, bit by bit: bf16, fp16, e4m3, e2m1, ue8m0 to and from
// float32. The written definition; backends that convert many values have faster forms, tested
// against these.
#pragma once

#include <bit>
#include <cstdint>

#include "device/macros.h"

namespace flash_mla {

FLASH_MLA_HD constexpr uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
FLASH_MLA_HD constexpr float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// 2^exponent for exponents of normal floats, -126 to 127.
FLASH_MLA_HD constexpr float pow2(int exponent) {
  return bits_float(static_cast<uint32_t>(exponent + 127) << 23);
}

FLASH_MLA_HD constexpr bool is_nan(float value) { return value != value; }

// Machines differ in the sign and the payload of the NaN that arithmetic gives: results have this
// one.
FLASH_MLA_HD constexpr float canonical_nan(float value) {
  return is_nan(value) ? bits_float(0x7fc00000u) : value;
}

FLASH_MLA_HD constexpr float abs_float(float value) {
  return bits_float(float_bits(value) & 0x7fffffffu);
}

// Rounds a magnitude to the nearest multiple of `quantum` (a power of two), ties to even. Exact as
// long as magnitude / quantum < 2^23: adding and taking away 2^23 quanta rounds at that bit.
FLASH_MLA_HD constexpr float round_to_quantum(float magnitude, float quantum) {
  const float shift = 8388608.0f * quantum;
  return (magnitude + shift) - shift;
}

// The exponent e with 2^e <= value < 2^(e+1), for normal positive values.
FLASH_MLA_HD constexpr int floor_log2(float value) {
  return static_cast<int>(float_bits(value) >> 23) - 127;
}

// bfloat16: the upper half of a float32.
FLASH_MLA_HD constexpr float bf16_to_float(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}
FLASH_MLA_HD constexpr uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (is_nan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// fp16: 5 exponent bits, bias 15.
FLASH_MLA_HD constexpr float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * pow2(-24)
                                        : bits_float(((exponent + 112u) << 23) | (mantissa << 13));
  return bits_float(sign | float_bits(magnitude));
}
FLASH_MLA_HD constexpr uint16_t float_to_fp16(float value) {
  const uint16_t sign = static_cast<uint16_t>((float_bits(value) >> 16) & 0x8000u);
  const float magnitude = abs_float(value);
  if (is_nan(value)) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < pow2(-14)) {  // subnormal: multiples of 2^-24
    return static_cast<uint16_t>(
        sign | static_cast<uint16_t>(round_to_quantum(magnitude, pow2(-24)) * 16777216.0f));
  }
  const uint32_t bits = float_bits(magnitude);
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

// e4m3 (OCP, "fn"): bias 7, no infinity, 0x7f and 0xff are NaN, the largest value is 448.
inline constexpr float kE4m3Max = 448.0f;
FLASH_MLA_HD constexpr float e4m3_to_float(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  const uint32_t exponent = (bits >> 3) & 0xfu;
  const uint32_t mantissa = bits & 0x7u;
  if ((bits & 0x7fu) == 0x7fu) return bits_float(sign | 0x7fc00000u);
  const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * pow2(-9)
                                        : bits_float(((exponent + 120u) << 23) | (mantissa << 20));
  return bits_float(sign | float_bits(magnitude));
}
// Rounds to nearest even and saturates at +-448; NaN is 0x7f, whatever its sign.
FLASH_MLA_HD constexpr uint8_t float_to_e4m3(float value) {
  const uint8_t sign = static_cast<uint8_t>((float_bits(value) >> 24) & 0x80u);
  const float magnitude = abs_float(value);
  if (is_nan(value)) return 0x7fu;
  if (magnitude >= kE4m3Max) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < pow2(-6)) {  // subnormal: multiples of 2^-9
    return static_cast<uint8_t>(
        sign | static_cast<uint8_t>(round_to_quantum(magnitude, pow2(-9)) * 512.0f));
  }
  const uint32_t bits = float_bits(magnitude);
  const uint32_t rounded = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  return static_cast<uint8_t>(sign | (rounded - (120u << 3)));
}

// ue8m0: a power of two, 2^(bits - 127); 255 is NaN.
FLASH_MLA_HD constexpr float ue8m0_to_float(uint8_t bits) {
  if (bits == 255) return bits_float(0x7fc00000u);
  return bits == 0 ? bits_float(0x00400000u) : pow2(bits - 127);  // 2^-127 is subnormal
}

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign; four bits.
inline constexpr float kE2m1Max = 6.0f;
FLASH_MLA_HD constexpr float e2m1_to_float(uint8_t nibble) {
  const uint32_t exponent = (nibble >> 1) & 0x3u;
  const uint32_t mantissa = nibble & 0x1u;
  const float magnitude = exponent == 0
                              ? static_cast<float>(mantissa) * 0.5f
                              : pow2(static_cast<int>(exponent) - 1) * (1.0f + 0.5f * mantissa);
  return (nibble & 0x8u) ? -magnitude : magnitude;
}
// Rounds to nearest even and saturates at +-6, as NaN does: the format has none.
FLASH_MLA_HD constexpr uint8_t float_to_e2m1(float value) {
  const uint8_t sign = static_cast<uint8_t>((float_bits(value) >> 28) & 0x8u);
  const float magnitude = abs_float(value);
  if (!(magnitude < kE2m1Max)) return static_cast<uint8_t>(sign | 0x7u);
  // Halves below 2, ones below 4, twos above: the quanta of the three exponents.
  const float quantum = magnitude < 2.0f ? 0.5f : magnitude < 4.0f ? 1.0f : 2.0f;
  const float rounded = round_to_quantum(magnitude, quantum);
  const uint8_t code = rounded < 2.0f   ? static_cast<uint8_t>(rounded * 2.0f)
                       : rounded < 4.0f ? static_cast<uint8_t>(2.0f + rounded)
                                        : static_cast<uint8_t>(4.0f + rounded * 0.5f);
  return static_cast<uint8_t>(sign | code);
}

}  // namespace flash_mla
