// mla_decode_dense, row sm90: what the kernel serves, its grid, workspace and tensor maps.
#pragma once

#include "mla_decode_dense/sm90/fp8/kernel.cuh"
#include "mla_decode_dense/sm90/fp8/tensor_maps.cuh"
#include "mla_decode_dense/sm90/kernel.cuh"
#include "runtime/tensor_map.h"

namespace flash_mla::mla_decode_dense::sm90 {

inline constexpr Row kRow = Row::kSm90;

// Float8 caches have a kernel of their own, in tiles of kTileRows rows or fewer.
template <class Cfg>
inline constexpr bool kFloat8 = kv_layout(Cfg::v.kv).value == KvValue::kE4m3;

inline int64_t rows_of(const Problem& p) { return p.s_q * (p.h_q / p.kv.h_kv); }

template <class Cfg>
const char* supports(const Problem& p) {
  if (p.kv.format != Cfg::v.kv) return "serves another cache format";
  if (p.q_dtype != Cfg::v.q) return "serves another dtype of q";
  if (p.d_qk != Cfg::v.d_qk) return "serves another d_qk";
  if (p.kv.page_size < 16) return "needs pages of 16 tokens or more";
  if (kFloat8<Cfg> && Cfg::v.tile_m < kTileRows && rows_of(p) > Cfg::v.tile_m) {
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
  return gpu_workspace(grid_of<Cfg>(p));
}

template <class Cfg>
Status make_maps(const Problem& p, const DecodeGrid& grid, TensorMaps* maps) {
  constexpr int64_t kBytes = 2;
  constexpr int64_t kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  const TensorMapShape q = {
      p.q,
      p.q_dtype,
      {kColumnsPerBlock, p.h_q, p.s_q, kColumnBlocks, p.b},
      {0, p.q_stride_h * kBytes, p.q_stride_s * kBytes, kTokenBytes, p.q_stride_b * kBytes},
      {kColumnsPerBlock, grid.tiles.heads_per_tile, grid.tiles.tokens_per_tile, 1, 1}};
  FLASH_MLA_RETURN_IF_ERROR(make_tensor_map(q, &maps->q));
  const int32_t keys = static_cast<int32_t>(min_of(p.kv.page_size, kTileKeys));
  // A cache without pages has no address perhaps; nothing is read of it.
  TensorMapShape kv = {
      p.kv.num_pages > 0 ? p.kv.data : p.q,
      p.q_dtype,
      {kColumnsPerBlock, p.kv.page_size, kColumnBlocks, p.kv.h_kv, max_of(1, p.kv.num_pages)},
      {0, p.kv.token_stride_bytes, kTokenBytes, p.kv.head_stride_bytes, p.kv.page_stride_bytes},
      {kColumnsPerBlock, keys, 1, 1, 1}};
  FLASH_MLA_RETURN_IF_ERROR(make_tensor_map(kv, &maps->kv_one));
  kv.box[2] = kPieceBlocks;
  return make_tensor_map(kv, &maps->kv_pair);
}

template <class Cfg>
Status launch(const Problem& p, const Workspace& workspace, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const GpuParams params = gpu_params(p, grid_of<Cfg>(p), workspace);
  FLASH_MLA_RETURN_IF_ERROR(launch_list_fixed_parts</*kProgrammatic=*/true>(params, stream));
  if constexpr (kFloat8<Cfg>) {
    fp8::TensorMaps maps = {};
    FLASH_MLA_RETURN_IF_ERROR(fp8::make_maps<Cfg>(p, &maps));
    FLASH_MLA_RETURN_IF_ERROR(
        launch_ctas<fp8::SharedStorage<Cfg>>(fp8::kernel<Cfg>, params, maps, stream));
  } else {
    TensorMaps maps;
    FLASH_MLA_RETURN_IF_ERROR(make_maps<Cfg>(p, params.grid, &maps));
    FLASH_MLA_RETURN_IF_ERROR(launch_ctas<SharedStorage<Cfg>>(kernel<Cfg>, params, maps, stream));
  }
  return launch_merge_fixed_splits<kMmaType<Cfg>,
                                   kFloat8<Cfg> ? PartColumns::kInOrder : PartColumns::kFragments,
                                   /*kProgrammatic=*/true>(params, stream);
}

}  // namespace flash_mla::mla_decode_dense::sm90
