// Quantising a tile of a token: the scale a format stores, and the codes.
#pragma once

#include <cstdint>

#include "device/kv_format.h"
#include "device/scalar.h"

namespace flash_mla {

// The scale of a tile whose largest magnitude is `amax`, as the format stores it.
struct TileScale {
  float value;
  uint8_t code;  // ue8m0 or e4m3; float32 scales are stored as `value`
};

FLASH_MLA_HD TileScale tile_scale(const KvLayout& layout, float amax) {
  if (layout.scale == KvScale::kE4m3) {
    // e2m1 values reach 6; the scale is rounded up so that none saturates, and is a normal e4m3.
    const float wanted = amax / kE2m1Max;
    const float least = pow2(-6);
    const uint8_t code = float_to_e4m3_round_up(wanted > least ? wanted : least);
    return {e4m3_to_float(code), code};
  }
  const float wanted = amax / kE4m3Max;
  const float value = ceil_pow2(wanted > kMinTileScale ? wanted : kMinTileScale);
  return {value, static_cast<uint8_t>(floor_log2(value) + 127)};
}

}  // namespace flash_mla
