// mla_decode_dense, row sm90: what the kernel serves, its grid, workspace and tensor maps.
#pragma once

#include "mla_decode_dense/sm90/kernel.cuh"
#include "mla_decode_dense/sm90/transposed/kernel.cuh"
#include "runtime/tensor_map.h"

namespace flash_mla::mla_decode_dense::sm90 {

inline constexpr Row kRow = Row::kSm90;

// Float8 caches and few rows have a kernel of their own.
template <class Cfg>
inline constexpr bool kTransposed =
    kv_layout(Cfg::v.kv).value == KvValue::kE4m3 || Cfg::v.tile_m < kTileRows;

inline int64_t rows_of(const Problem& p) { return p.s_q * (p.h_q / p.kv.h_kv); }

template <class Cfg>
const char* supports(const Problem& p) {
  if (p.kv.format != Cfg::v.kv) return "serves another cache format";
  if (p.q_dtype != Cfg::v.q) return "serves another dtype of q";
  if (p.d_qk != Cfg::v.d_qk) return "serves another d_qk";
  if (p.kv.page_size < 16) return "needs pages of 16 tokens or more";
  if (Cfg::v.tile_m < kTileRows && rows_of(p) > Cfg::v.tile_m) {
    return "serves fewer rows of a key head";
  }
  return nullptr;
}

template <class Cfg>
DecodeGrid grid_of(const Problem& p) {
  const DeviceCaps* caps = nullptr;
  const Status status = device_caps(p.device, &caps);  // selection has asked before
  const int64_t sms = status.ok() ? caps->num_sms : 1;
  return decode_grid(p.b, p.s_q, p.h_q / p.kv.h_kv, p.kv.h_kv, Cfg::v.tile_m, kMaxTeam, sms,
                     max_blocks(p), p.batch_invariant);
}

template <class Cfg>
WorkspaceSize workspace(const Problem& p) {
  return decode_workspace(grid_of<Cfg>(p));
}

inline Status make_query_map(const Problem& p, const DecodeGrid& grid, CUtensorMap* map) {
  constexpr int64_t kBytes = 2;
  const TensorMapShape q = {
      p.q,
      p.q_dtype,
      {kColumnsPerBlock, p.h_q, p.s_q, p.d_qk / kColumnsPerBlock, p.b},
      {0, p.q_stride_h * kBytes, p.q_stride_s * kBytes, kTokenBytes, p.q_stride_b * kBytes},
      {kColumnsPerBlock, grid.tiles.heads_per_tile, grid.tiles.tokens_per_tile, 1, 1}};
  return make_tensor_map(q, map);
}

// Of boxes of min(64, page_size) keys and `blocks_at_once` blocks, from `first_byte` of a token on.
inline Status make_key_map(const Problem& p, DType dtype, int64_t first_byte, int32_t block_columns,
                           int32_t blocks, int32_t blocks_at_once, int32_t swizzle_bytes,
                           CUtensorMap* map) {
  const int32_t block_bytes = block_columns * (dtype == DType::kFloat8E4M3 ? 1 : 2);
  // A cache without pages has no address perhaps; nothing is read of it.
  const auto* const data = p.kv.num_pages > 0 ? p.kv.data : static_cast<const uint8_t*>(p.q);
  const TensorMapShape shape = {
      data + first_byte,
      dtype,
      {block_columns, p.kv.page_size, blocks, p.kv.h_kv, max_of(1, p.kv.num_pages)},
      {0, p.kv.token_stride_bytes, block_bytes, p.kv.head_stride_bytes, p.kv.page_stride_bytes},
      {block_columns, static_cast<int32_t>(min_of(p.kv.page_size, kTileKeys)), blocks_at_once, 1,
       1},
      swizzle_bytes};
  return make_tensor_map(shape, map);
}

template <class Cfg>
Status make_maps(const Problem& p, const DecodeGrid& grid, TensorMaps* maps) {
  constexpr int kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  FLASH_MLA_RETURN_IF_ERROR(make_query_map(p, grid, &maps->q));
  const auto make = [&](int32_t blocks_at_once, CUtensorMap* map) {
    return make_key_map(p, p.q_dtype, 0, kColumnsPerBlock, kColumnBlocks, blocks_at_once,
                        kTokenBytes, map);
  };
  FLASH_MLA_RETURN_IF_ERROR(make(1, &maps->kv_one));
  return make(kPieceBlocks, &maps->kv_pair);
}

template <class Cfg>
Status make_maps(const Problem& p, const DecodeGrid& grid, transposed::TensorMaps* maps) {
  using C = transposed::Config<Cfg>;
  const int32_t blocks_at_once = p.kv.page_size >= kTileKeys ? C::kPieceBlocks : 1;
  if constexpr (!C::kCodes) {
    FLASH_MLA_RETURN_IF_ERROR(make_query_map(p, grid, &maps->q));
    return make_key_map(p, p.q_dtype, 0, kColumnsPerBlock, C::kKeyBlocks, blocks_at_once,
                        kTokenBytes, &maps->keys);
  } else {
    const auto make = [&](int64_t first_byte, int32_t bytes, int32_t blocks, int32_t at_once,
                          int32_t swizzle_bytes, CUtensorMap* map) {
      return make_key_map(p, DType::kFloat8E4M3, first_byte, bytes, blocks, at_once, swizzle_bytes,
                          map);
    };
    FLASH_MLA_RETURN_IF_ERROR(
        make(0, transposed::kCodeBlock, C::kKeyBlocks, blocks_at_once, 128, &maps->keys));
    if constexpr (C::kRope) {
      constexpr int64_t kFirst = C::kScaled ? C::kLayout.rope_offset_bytes : kLatentDim;
      FLASH_MLA_RETURN_IF_ERROR(
          make(kFirst, C::kRopeRowBytes, 1, 1, C::kRopeRowBytes, &maps->rope));
    }
    if constexpr (C::kScaled) {
      FLASH_MLA_RETURN_IF_ERROR(
          make(C::kLayout.scales_offset_bytes, C::kScales * 4, 1, 1, 0, &maps->scales));
    }
    return {};
  }
}

template <class Cfg>
Status launch(const Problem& p, const Workspace& workspace, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const GpuParams params = gpu_params(p, grid_of<Cfg>(p), workspace);
  FLASH_MLA_RETURN_IF_ERROR(launch_list_fixed_parts<Op, /*kProgrammatic=*/true>(params, stream));
  if constexpr (kTransposed<Cfg>) {
    transposed::TensorMaps maps = {};
    FLASH_MLA_RETURN_IF_ERROR(make_maps<Cfg>(p, params.grid, &maps));
    FLASH_MLA_RETURN_IF_ERROR(
        launch_ctas<transposed::SharedStorage<Cfg>>(transposed::kernel<Cfg>, params, maps, stream));
    return launch_merge_fixed_splits<Op, transposed::Config<Cfg>::kOutType, PartColumns::kInOrder,
                                     /*kProgrammatic=*/true>(params, stream);
  } else {
    TensorMaps maps;
    FLASH_MLA_RETURN_IF_ERROR(make_maps<Cfg>(p, params.grid, &maps));
    FLASH_MLA_RETURN_IF_ERROR(launch_ctas<SharedStorage<Cfg>>(kernel<Cfg>, params, maps, stream));
    return launch_merge_fixed_splits<Op, kMmaType<Cfg>, PartColumns::kFragments,
                                     /*kProgrammatic=*/true>(params, stream);
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90
