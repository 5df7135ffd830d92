// Quantising a tile of a token: the scale that a format stores. Without division and by integers,
// so that it costs a GPU little; scalar_test.cc holds it to the definition in kv_format.h's terms.
#pragma once

#include <cstdint>

#include "device/kv_format.h"
#include "device/scalar.h"

namespace flash_mla {

// The exponent of the smallest power of two that is at least max(amax / 448, 1e-4), with the bias
// of float32 and ue8m0. 255, an infinite scale, for an infinite amax.
FLASH_MLA_HD constexpr int e4m3_tile_exponent(float amax) {
  // 448 is 1.75 * 2^8: the addition carries into the exponent when the significand exceeds 1.75.
  constexpr uint32_t kCarry = 0x7fffffu - (float_bits(1.75f) & 0x7fffffu);
  static_assert(kE4m3Max == 1.75f * 256.0f);
  constexpr int kLeast = 127 - 13;
  static_assert(pow2(kLeast - 127) >= kMinTileScale && pow2(kLeast - 128) < kMinTileScale);
  const uint32_t bits = float_bits(amax);
  if (bits == 0x7f800000u) return 255;
  const int exponent = static_cast<int>((bits + kCarry) >> 23) - 8;
  return exponent > kLeast ? exponent : kLeast;
}

// The smallest e4m3 that is at least amax / 6, within [2^-6, 448].
FLASH_MLA_HD constexpr uint8_t e2m1_tile_scale(float amax) {
  constexpr float kLeast = kE2m1Max * pow2(-6);
  constexpr float kMost = kE2m1Max * kE4m3Max;
  const float wanted = amax < kLeast ? kLeast : amax > kMost ? kMost : amax;
  // A little more than wanted / 6, rounded up to e4m3's three bits behind the point, is right or
  // one step too large. The products that decide are exact.
  constexpr float kAboveOneSixth = 0x1.55556p-3f;
  constexpr uint32_t kStep = 1u << 20;
  const uint32_t above = (float_bits(wanted * kAboveOneSixth) + (kStep - 1)) & ~(kStep - 1);
  const uint32_t below = above - kStep;
  const uint32_t bits = kE2m1Max * bits_float(below) >= wanted ? below : above;
  return static_cast<uint8_t>((bits >> 20) - (120u << 3));
}

// The scale of a tile whose largest magnitude is `amax`, as the format stores it.
struct TileScale {
  float value;
  uint8_t code;  // ue8m0 or e4m3; float32 scales are stored as `value`
};

FLASH_MLA_HD TileScale tile_scale(const KvLayout& layout, float amax) {
  if (layout.scale == KvScale::kE4m3) {
    const uint8_t code = e2m1_tile_scale(amax);
    return {e4m3_to_float(code), code};
  }
  const int exponent = e4m3_tile_exponent(amax);
  return {bits_float(static_cast<uint32_t>(exponent) << 23), static_cast<uint8_t>(exponent)};
}

}  // namespace flash_mla
