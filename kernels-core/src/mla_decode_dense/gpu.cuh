// What the GPU rows of mla_decode_dense share: lengths, the rows of an M tile, results, workspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/decode_schedule.cuh"
#include "device/mask.h"
#include "device/online_softmax.h"
#include "device/sm90/programmatic_launch.cuh"
#include "device/split_reduce.cuh"
#include "mla_decode_dense/problem.h"
#include "runtime/device_caps.h"
#include "runtime/launch.h"

namespace flash_mla::mla_decode_dense {

static_assert(kPartialCols == kLatentDim);

// What a kernel takes: the problem, and how this launch lays it over CTAs.
struct GpuParams : Params {
  DecodeGrid grid;
  int32_t group;  // query heads of a key head
  PartialTiles partials;
  Meeting* meetings;
  ListedPart* list;  // of batch-invariant launches
  int32_t num_listed;
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

// Two output elements, the first in the low half.
template <DType kOut>
__device__ __forceinline__ uint32_t pack_out(float a, float b) {
  static_assert(kOut == DType::kBFloat16 || kOut == DType::kFloat16);
  if constexpr (kOut == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

__device__ __forceinline__ SplitUnit split_unit(const GpuParams& p, const WorkItem& item,
                                                int32_t member) {
  return {p.meetings, item.first_team * p.grid.team + member, p.grid.team, item.part,
          item.num_parts};
}

// Merges a share of a split item's rows into the outputs, by `kWarps` warps.
template <DType kOut, int kWarps, class Barrier>
__device__ __forceinline__ void merge_item_share(const GpuParams& p, const WorkItem& item,
                                                 int32_t member, int32_t share, int32_t num_shares,
                                                 int warp, void* smem, const Barrier& barrier) {
  const TileRows rows(p, item, member, request_length(p, item.request));
  const float factor = descale(p.descale_k, p.descale_k_stride, item.request);
  merge_share<kOut, kWarps>(
      PartTiles(p.partials, p.grid, item, member), share, num_shares, warp, smem,
      [&](int32_t row) { return rows.valid(p, row) ? rows.out(p, row) : nullptr; },
      [&](uint8_t* out, int32_t column, const float4(&v)[2]) {
        *reinterpret_cast<uint4*>(out + 2 * column) =
            make_uint4(pack_out<kOut>(v[0].x * factor, v[0].y * factor),
                       pack_out<kOut>(v[0].z * factor, v[0].w * factor),
                       pack_out<kOut>(v[1].x * factor, v[1].y * factor),
                       pack_out<kOut>(v[1].z * factor, v[1].w * factor));
      },
      [&](int32_t row, float lse) { *rows.lse(p, row) = lse; }, barrier);
}

// The first kernel of batch-invariant launches.
inline constexpr int kListThreads = 1024;
template <bool kProgrammatic>
__global__ void __launch_bounds__(kListThreads) list_fixed_parts_kernel(GpuParams p) {
  __shared__ int32_t keys[kListThreads], counts[kListThreads];
  if constexpr (kProgrammatic) {
    flash_mla::sm90::launch_successor();
    flash_mla::sm90::wait_for_predecessor();
  }
  list_fixed_parts<kListThreads>(p.grid, RequestBlocks{p}, keys, counts, p.list, p.num_listed);
}

// The last kernel of batch-invariant launches: merges every unit's fixed parts. blockIdx.x is the
// tile (unit, member), blockIdx.y the share of its rows.
inline constexpr int kMergeWarps = 8;
inline constexpr int kMergeShares = 8;
template <DType kOut, bool kProgrammatic>
__global__ void __launch_bounds__(kMergeWarps* kLanes) merge_fixed_splits_kernel(GpuParams p) {
  extern __shared__ float4 smem[];
  const int64_t unit = blockIdx.x / p.grid.team;
  const int32_t request = static_cast<int32_t>(unit / p.grid.units_per_request);
  if constexpr (kProgrammatic) flash_mla::sm90::wait_for_predecessor();
  const WorkItem item =
      fixed_item(p.grid, request, static_cast<int32_t>(unit % p.grid.units_per_request), 0,
                 RequestBlocks{p}(request));
  if (item.num_parts == 1) return;  // its only part went straight to the outputs
  merge_item_share<kOut, kMergeWarps>(p, item, blockIdx.x % p.grid.team, blockIdx.y, kMergeShares,
                                      threadIdx.x / kLanes, smem, [] { __syncthreads(); });
}

// After a CTA's last item: meets the other CTAs of its (at most two) split units and merges its
// shares. Called by `kWarps` warps, `thread` counts their threads; barrier() synchronises them and
// stands between their writes of partial results and this call. smem_outcome: shared memory.
template <DType kOut, int kWarps, class Barrier>
__device__ __forceinline__ void merge_split_units(const GpuParams& p, const WorkItem* split_items,
                                                  int32_t num_items, int32_t member, int thread,
                                                  void* smem, uint32_t* smem_outcome,
                                                  const Barrier& barrier) {
#pragma unroll 1
  for (int32_t i = 0; i < num_items; ++i) {
    const WorkItem item = split_items[i];
    const SplitUnit unit = split_unit(p, item, member);
    if (thread == 0) {
      *smem_outcome = unit.wait();
      if (*smem_outcome == SplitUnit::kCompleteWithAbsent && !unit.heir()) {
        *smem_outcome = SplitUnit::kComplete;
      }
      if (*smem_outcome != SplitUnit::kCompleteWithAbsent) unit.leave();
    }
    barrier();
    const uint32_t outcome = *smem_outcome;
    const bool inherits = outcome == SplitUnit::kCompleteWithAbsent;
#pragma unroll 1
    for (int32_t share = inherits ? 0 : item.part; share < item.num_parts; ++share) {
      bool takes = outcome != SplitUnit::kIncomplete && share == item.part;
      if (inherits) {
        barrier();
        if (thread == 0) *smem_outcome = takes || unit.has_given_up(share);
        barrier();
        takes = *smem_outcome != 0;
      }
      if (takes) {
        merge_item_share<kOut, kWarps>(p, item, member, share, item.num_parts, thread / kLanes,
                                       smem, barrier);
      }
      if (!inherits) break;
    }
    barrier();
    if (thread == 0 && inherits) unit.leave();
  }
}

// ---- host ---------------------------------------------------------------------------------------

inline int64_t max_blocks(const Params& p) {
  return ceil_div(p.max_pages * p.kv.page_size, kBlockKeys);
}

inline int64_t num_listed(const DecodeGrid& g) {
  return int64_t{g.num_units()} * g.invariant_splits;
}

inline int64_t list_bytes(const DecodeGrid& g) {
  return g.invariant_splits == 0 ? 0 : (num_listed(g) + 1) * int64_t{sizeof(ListedPart)};
}

// Scratch holds the partial tiles, then the list.
inline WorkspaceSize gpu_workspace(const DecodeGrid& g) {
  return {num_partial_tiles(g) * PartialTiles::tile_bytes(g.tiles.rows()) + list_bytes(g),
          g.invariant_splits == 0 ? g.num_ctas() * int64_t{sizeof(Meeting)} : 0};
}

inline GpuParams gpu_params(const Problem& p, const DecodeGrid& g, const Workspace& workspace) {
  auto* const scratch = static_cast<uint8_t*>(workspace.scratch);
  const int64_t partial_bytes = num_partial_tiles(g) * PartialTiles::tile_bytes(g.tiles.rows());
  GpuParams params;
  static_cast<Params&>(params) = p;
  params.grid = g;
  params.group = static_cast<int32_t>(p.h_q / p.kv.h_kv);
  params.partials = {scratch, g.tiles.rows()};
  params.meetings = static_cast<Meeting*>(workspace.sync);
  params.list = reinterpret_cast<ListedPart*>(scratch + partial_bytes);
  params.num_listed = static_cast<int32_t>(num_listed(g));
  return params;
}

// The launch that comes before the kernel in batch-invariant calls.
template <bool kProgrammatic>
Status launch_list_fixed_parts(const GpuParams& p, Stream stream) {
  if (p.grid.invariant_splits == 0) return {};
  const LaunchShape shape = {
      .grid = dim3(1), .block = dim3(kListThreads), .programmatic = kProgrammatic};
  return launch_kernel(list_fixed_parts_kernel<kProgrammatic>, shape, stream, kOperator, p);
}

// The launch that ends batch-invariant calls.
template <DType kOut, bool kProgrammatic>
Status launch_merge_fixed_splits(const GpuParams& p, Stream stream) {
  if (p.grid.invariant_splits <= 1) return {};
  const LaunchShape shape = {
      .grid = dim3(static_cast<uint32_t>(p.grid.num_units() * p.grid.team), kMergeShares),
      .block = dim3(kMergeWarps * kLanes),
      .smem_bytes = static_cast<size_t>(
          merge_share_smem_bytes(kMergeWarps, p.grid.tiles.rows(), kInvariantSplits)),
      .programmatic = kProgrammatic};
  return launch_kernel(merge_fixed_splits_kernel<kOut, kProgrammatic>, shape, stream, kOperator, p);
}

}  // namespace flash_mla::mla_decode_dense
