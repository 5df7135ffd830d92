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

// `writers`: warps of a CTA that write a part.
__device__ __forceinline__ SplitUnit split_unit(const GpuParams& p, const WorkItem& item,
                                                int32_t member, int32_t writers) {
  return {p.meetings,     item.first_team * p.grid.team + member,
          p.grid.team,    item.part,
          item.num_parts, writers};
}

// Where the merged rows of a split item go.
struct MergedRows {
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
inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeShares = 8;
template <DType kOut, PartColumns kColumns, bool kProgrammatic>
__global__ void __launch_bounds__(kMergeThreads) merge_fixed_splits_kernel(GpuParams p) {
  extern __shared__ float4 smem[];
  const int64_t unit = blockIdx.x / p.grid.team;
  const int32_t request = static_cast<int32_t>(unit / p.grid.units_per_request);
  const int32_t member = static_cast<int32_t>(blockIdx.x) % p.grid.team;
  if constexpr (kProgrammatic) flash_mla::sm90::wait_for_predecessor();
  const WorkItem item =
      fixed_item(p.grid, request, static_cast<int32_t>(unit % p.grid.units_per_request), 0,
                 RequestBlocks{p}(request));
  if (item.num_parts == 1) return;  // its only part went straight to the outputs
  const int thread = static_cast<int>(threadIdx.x);
  const auto tiles = PartTiles::of</*kFixed=*/true>(p.partials, p.grid, item, member);
  MergeThread own(tiles, blockIdx.y, kMergeShares, thread, kMergeThreads);
  own.load_header();
  merge<kOut, kColumns, kMergeThreads>(tiles, own, thread, smem, MergedRows{p, item, member},
                                       [] { __syncthreads(); });
}

// After a CTA's last item: meets the other CTAs of its (at most two) split units and merges its
// shares. Called by kThreads threads, whose number `thread` is; barrier() synchronises them.
// `outcomes`: in shared memory, for each unit.
template <DType kOut, PartColumns kColumns, int kThreads, class Barrier>
__device__ __forceinline__ void merge_split_units(const GpuParams& p, const WorkItem* split_items,
                                                  int32_t num_items, int32_t member,
                                                  int32_t writers, int thread, void* smem,
                                                  uint32_t* outcomes, const Barrier& barrier) {
  // One thread meets the others: the last, which has least to do where little is merged. Asked
  // anew each time, so that no predicate is kept.
  const auto speaks = [&] {
    int32_t number = thread;
    sm80::pin(number);
    return number == kThreads - 1;
  };
#pragma unroll 1
  for (int32_t i = 0; i < num_items; ++i) {
    const WorkItem item = split_items[i];
    const SplitUnit unit = split_unit(p, item, member, writers);
    const auto tiles = PartTiles::of</*kFixed=*/false>(p.partials, p.grid, item, member);
    // Before the barrier, which leaves time for it.
    MergeThread own(tiles, item.part, item.num_parts, thread, kThreads);
    sm80::pin(own.data_at);
    sm80::pin(own.header_at);
    if (speaks()) outcomes[i] = unit.wait();
    barrier();
    own.load_header();  // first of all: what is loaded next waits for it
    const uint32_t outcome = outcomes[i];
    const bool inherits = outcome == SplitUnit::kInherits;
    uint32_t left_before = 0;  // comes while the merge is under way
    if (speaks() && !inherits) left_before = unit.leave();
    bool takes = outcome != SplitUnit::kIncomplete;
#pragma unroll 1
    for (int32_t other = 0;; ++other) {
      // Where results go is worked out while the loads are under way, not before.
      WorkItem here = item;
      sm80::pin(here.request);
      sm80::pin(here.unit);
      if (takes) {
        merge<kOut, kColumns, kThreads>(tiles, own, thread, smem, MergedRows{p, here, member},
                                        barrier);
      }
      if (!inherits || other == item.num_parts) break;
      barrier();
      if (speaks()) outcomes[i] = other != item.part && unit.has_given_up(other);
      barrier();
      takes = outcomes[i] != 0;
      own = MergeThread(tiles, other, item.num_parts, thread, kThreads);
      own.load_header();
    }
    if (speaks()) unit.clean_up(inherits ? unit.leave() : left_before);
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
template <DType kOut, PartColumns kColumns, bool kProgrammatic>
Status launch_merge_fixed_splits(const GpuParams& p, Stream stream) {
  if (p.grid.invariant_splits <= 1) return {};
  const LaunchShape shape = {
      .grid = dim3(static_cast<uint32_t>(p.grid.num_units() * p.grid.team), kMergeShares),
      .block = dim3(kMergeThreads),
      .smem_bytes = static_cast<size_t>(merge_smem_bytes(kMergeThreads, p.grid.tiles.rows())),
      .programmatic = kProgrammatic};
  return launch_kernel(merge_fixed_splits_kernel<kOut, kColumns, kProgrammatic>, shape, stream,
                       kOperator, p);
}

}  // namespace flash_mla::mla_decode_dense
