// The compile-time shape of a kernel and its shared memory, from its variant.
#pragma once

#include <cstdint>

#include "device/kv_format.h"
#include "device/portable/smem.h"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_sparse::portable {

using flash_mla::portable::kSlabCols;
using flash_mla::portable::kSlabs;
using flash_mla::portable::kTileKeys;

// Tiles of formats that share a scale among fewer columns than a slab has are converted to bf16.
constexpr bool is_converted(KvFormat format) {
  return format == KvFormat::kV4Fp8 || format == KvFormat::kV41Fp8;
}

// Bytes of 32 tokens before they are converted: of each slab its columns, then their scales.
template <KvFormat kFormat>
struct RawStage {
  static constexpr KvLayout kLayout = kv_layout(kFormat);
  static_assert(kLayout.value == KvValue::kE4m3 && kLayout.scale == KvScale::kUe8m0);
  // v4_fp8: the last slab ends with RoPE columns of 2 bytes, which lie behind its codes.
  static constexpr int kRopeCols = kLayout.d_rope();
  static_assert(kRopeCols == 0 || kLayout.rope_offset_bytes == kLayout.d_nope);
  static constexpr int kRowBytes = kSlabCols;
  // Of a token and slab. v41_fp8: 4, and 8 of a v41_fp4 token of the extra cache; v4_fp8: the 2 of
  // another slab are copied, too, as 4 bytes are the least.
  static constexpr bool kTakesE2m1 = kFormat == KvFormat::kV41Fp8;
  static constexpr KvLayout kE2m1Layout = kv_layout(KvFormat::kV41Fp4);
  static constexpr int kScaleBytes = kTakesE2m1 ? kSlabCols / kE2m1Layout.scale_tile : 4;

  // What a warp knows of its part.
  struct Note {
    uint32_t valid_keys;
    bool is_e2m1;
  };

  alignas(16) uint8_t values[kTileKeys * (kSlabs * kRowBytes + kRopeCols)];
  alignas(8) uint8_t scales[kSlabs][kTileKeys][kScaleBytes];
  alignas(16) Note notes[2 * kSlabs];

  static __device__ bool has_rope(int slab) { return kRopeCols > 0 && slab == kSlabs - 1; }
  static __device__ int row_bytes(int slab) { return kRowBytes + (has_rope(slab) ? kRopeCols : 0); }
  __device__ uint8_t* slab_values(int slab) { return values + slab * (kTileKeys * kRowBytes); }
};

// Of tiles: bf16, or v32_fp8 as it is.
template <class Cfg>
struct TileCfg {
  static constexpr VariantSpec v = {.kv = is_converted(Cfg::v.kv) ? KvFormat::kBf16 : Cfg::v.kv,
                                    .q = Cfg::v.q,
                                    .d_qk = Cfg::v.d_qk,
                                    .tile_m = Cfg::v.tile_m};
};

template <class C, KvFormat kFormat>
struct ConvertingStorage : flash_mla::portable::SharedStorage<C> {
  RawStage<kFormat> raw[C::kStages];
};

template <class Cfg, bool kConverted = is_converted(Cfg::v.kv)>
struct Shape {
  using Config = flash_mla::portable::Config<TileCfg<Cfg>>;
  using SharedStorage = flash_mla::portable::SharedStorage<Config>;
};
template <class Cfg>
struct Shape<Cfg, true> {
  using Config = flash_mla::portable::Config<TileCfg<Cfg>, sizeof(RawStage<Cfg::v.kv>)>;
  using SharedStorage = ConvertingStorage<Config, Cfg::v.kv>;
};

}  // namespace flash_mla::mla_decode_sparse::portable
