// What the GPU rows of mla_decode_dense share: lengths, the rows of an M tile, results, workspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/decode_launch.cuh"
#include "device/mask.h"
#include "device/online_softmax.h"
#include "mla_decode_dense/problem.h"
#include "runtime/device_caps.h"

namespace flash_mla::mla_decode_dense {

static_assert(kPartialCols == kLatentDim);

// What a kernel takes: the problem, and how this launch lays it over CTAs.
struct GpuParams : Params, DecodeLaunch {
  int32_t group;  // query heads of a key head
};

__device__ __forceinline__ int32_t request_length(const Params& p, int32_t request) {
  return p.cache_seqlens[request * p.cache_seqlens_stride];
}
// Keys of a request that block_table has a page for; cache_seqlens beyond it are masked.
__device__ __forceinline__ int32_t clamp_length(const Params& p, int64_t length) {
  return static_cast<int32_t>(max_of(0, min_of(length, p.max_pages * p.kv.page_size)));
}

struct RequestBlocks {
  const Params& p;
  __device__ int32_t operator()(int32_t request) const {
    return (clamp_length(p, request_length(p, request)) + kBlockKeys - 1) / kBlockKeys;
  }
};

__device__ __forceinline__ float descale(const float* scales, int64_t stride, int32_t request) {
  return scales == nullptr ? 1.0f : scales[request * stride];
}

// Logits in units of log2 are q.k times this.
__device__ __forceinline__ float logit_scale_log2(const Params& p, int32_t request) {
  return p.softmax_scale * kLog2e * descale(p.descale_q, p.descale_q_stride, request) *
         descale(p.descale_k, p.descale_k_stride, request);
}

// The query rows of one CTA's M tile in an item.
struct TileRows {
  int32_t length;  // cache_seqlens of the request
  int32_t request;
  int32_t kv_head;
  int32_t tile;  // at or beyond tiles.num_tiles(): this member of the team has none
  int32_t first_token;
  int32_t first_head;  // of the key head's group
  int32_t group;

  __device__ TileRows(const GpuParams& p, const WorkItem& item, int32_t member, int32_t length)
      : length(length),
        request(item.request),
        kv_head(p.grid.by_passes.divide(item.unit)),
        tile((item.unit - kv_head * p.grid.passes) * p.grid.team + member),
        first_token(p.grid.tiles.first_token(tile)),
        first_head(p.grid.tiles.first_head(tile)),
        group(p.group) {}

  __device__ int32_t num_keys(const GpuParams& p) const { return clamp_length(p, length); }
  __device__ bool any(const GpuParams& p) const { return tile < p.grid.tiles.num_tiles(); }
  __device__ int32_t token(const GpuParams& p, int32_t row) const {
    return first_token + p.grid.tiles.by_heads.divide(row);
  }
  __device__ int32_t head_in_group(const GpuParams& p, int32_t row) const {
    return first_head + p.grid.tiles.by_heads.remainder(row);
  }
  __device__ bool valid(const GpuParams& p, int32_t row) const {
    return row < p.grid.tiles.rows() && token(p, row) < p.s_q && head_in_group(p, row) < group;
  }
  __device__ int64_t head(const GpuParams& p, int32_t row) const {
    return int64_t{kv_head} * group + head_in_group(p, row);
  }
  // Query tokens that the tile has rows of.
  __device__ int32_t num_tokens(const GpuParams& p) const {
    return min(p.grid.tiles.tokens_per_tile, static_cast<int32_t>(p.s_q) - first_token);
  }
  // Keys [0, n) that a row attends; rows that are not valid attend none.
  __device__ int32_t visible(const GpuParams& p, int32_t row) const {
    if (!valid(p, row)) return 0;
    const int32_t s_q = static_cast<int32_t>(p.s_q);
    const int32_t keys = visible_keys(length, s_q, token(p, row), p.causal);
    return max(0, min(num_keys(p), keys));
  }
  // The byte address of a row's first output element.
  __device__ uint8_t* out(const GpuParams& p, int32_t row) const {
    return static_cast<uint8_t*>(p.out) +
           2 * (request * p.out_stride_b + token(p, row) * p.out_stride_s +
                head(p, row) * p.out_stride_h);
  }
  __device__ float* lse(const GpuParams& p, int32_t row) const {
    return p.lse + request * p.lse_stride_b + head(p, row) * p.lse_stride_h +
           token(p, row) * p.lse_stride_s;
  }
};

// Where the merged rows of a split item go.
struct MergedRows {
  static constexpr bool kSinks = false;
  const GpuParams& p;
  const WorkItem& item;
  int32_t member;

  __device__ MergedRow row(int32_t row) const {
    const TileRows rows(p, item, member, /*length=*/0);
    if (!rows.valid(p, row)) return {};
    return {rows.out(p, row), rows.lse(p, row)};
  }
  __device__ float factor() const { return descale(p.descale_k, p.descale_k_stride, item.request); }
};

struct Op {
  using Params = GpuParams;
  using Blocks = RequestBlocks;
  using Output = MergedRows;
  static constexpr const char* kName = kOperator;
};

// ---- host ---------------------------------------------------------------------------------------

inline int64_t max_blocks(const Params& p) {
  return ceil_div(p.max_pages * p.kv.page_size, kBlockKeys);
}

inline GpuParams gpu_params(const Problem& p, const DecodeGrid& g, const Workspace& workspace) {
  GpuParams params;
  static_cast<Params&>(params) = p;
  static_cast<DecodeLaunch&>(params) = decode_launch(g, workspace);
  params.group = static_cast<int32_t>(p.h_q / p.kv.h_kv);
  return params;
}

}  // namespace flash_mla::mla_decode_dense
