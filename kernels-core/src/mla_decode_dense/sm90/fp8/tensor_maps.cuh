// mla_decode_dense, row sm90: the tensor maps of float8 caches.
#pragma once

#include "mla_decode_dense/sm90/fp8/load.cuh"
#include "runtime/tensor_map.h"

namespace flash_mla::mla_decode_dense::sm90::fp8 {

template <class Cfg>
Status make_maps(const Problem& p, TensorMaps* maps) {
  using C = Config<Cfg>;
  const int32_t keys = static_cast<int32_t>(min_of(p.kv.page_size, kTileKeys));
  // A cache without pages has no address perhaps; nothing is read of it.
  const auto* const data = p.kv.num_pages > 0 ? p.kv.data : static_cast<const uint8_t*>(p.q);
  const auto make = [&](int64_t first_byte, int32_t bytes, int32_t blocks, int32_t blocks_at_once,
                        int32_t swizzle_bytes, CUtensorMap* map) {
    const TensorMapShape shape = {
        data + first_byte,
        DType::kFloat8E4M3,
        {bytes, p.kv.page_size, blocks, p.kv.h_kv, max_of(1, p.kv.num_pages)},
        {0, p.kv.token_stride_bytes, bytes, p.kv.head_stride_bytes, p.kv.page_stride_bytes},
        {bytes, keys, blocks_at_once, 1, 1},
        swizzle_bytes};
    return make_tensor_map(shape, map);
  };
  constexpr int kBlocks = kLatentDim / kCodeBlock;
  FLASH_MLA_RETURN_IF_ERROR(
      make(0, kCodeBlock, kBlocks, keys == kTileKeys ? kBlocks : 1, 128, &maps->codes));
  if constexpr (C::kRope) {
    constexpr int64_t kFirst = C::kScaled ? C::kLayout.rope_offset_bytes : kLatentDim;
    FLASH_MLA_RETURN_IF_ERROR(make(kFirst, C::kRopeRowBytes, 1, 1, C::kRopeRowBytes, &maps->rope));
  }
  if constexpr (C::kScaled) {
    FLASH_MLA_RETURN_IF_ERROR(
        make(C::kLayout.scales_offset_bytes, C::kScales * 4, 1, 1, 0, &maps->scales));
  }
  return {};
}

}  // namespace flash_mla::mla_decode_dense::sm90::fp8
