// What the GPU rows of mla_decode_sparse share: the tokens of a query, the rows of an M tile,
// results, workspace.
//
// In terms of device/decode_schedule.h a request has s_q units or a multiple of that: a query
// token's heads are cut into M tiles, and a team takes as many of them as it has CTAs. A block is
// 64 entries of one TokenSet; those of the extra cache come after the main one's.
#pragma once

#include "device/decode_launch.cuh"
#include "device/online_softmax.h"
#include "mla_decode_sparse/problem.h"
#include "runtime/device_caps.h"

namespace flash_mla::mla_decode_sparse {

static_assert(kPartialCols == kLatentDim);

// Division of an index by a page size: exact below 2^31.
struct PageDivisor {
  uint32_t factor, shift;

  static PageDivisor of(int64_t page_size) {
    if (page_size >= int64_t{1} << 31) return {0, 0};  // one page has all that an index can name
    uint32_t log2 = 0;
    while (int64_t{1} << log2 < page_size) ++log2;
    const uint64_t numerator = uint64_t{1} << (31 + log2);
    return {static_cast<uint32_t>((numerator + page_size - 1) / max_of(1, page_size)), 31 + log2};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t index) const {
    return static_cast<uint32_t>(uint64_t{index} * factor >> shift);
  }
};

struct GpuParams : Params, DecodeLaunch {
  // Of the main cache and the extra one:
  PageDivisor pages[2];
  uint32_t num_slots[2];  // those that an index can name
};

// Entries of a request's queries in a token set.
__device__ __forceinline__ int32_t num_tokens(const TokenSet& set, int32_t request) {
  const auto topk = static_cast<int32_t>(set.topk);
  if (set.topk_length == nullptr) return topk;
  return max(0, min(topk, set.topk_length[request * set.topk_length_stride]));
}

struct RequestBlocks {
  const Params& p;
  __device__ int32_t operator()(int32_t request) const {
    return ceil_div(num_tokens(p.main, request), kBlockKeys) +
           ceil_div(num_tokens(p.extra, request), kBlockKeys);
  }
};

// The query rows of one CTA's M tile in an item: heads of one query token.
struct TileRows {
  int32_t request;
  int32_t token;
  int32_t tile;  // at or beyond tiles.num_tiles(): this member of the team has none
  int32_t first_head;

  __device__ TileRows(const GpuParams& p, const WorkItem& item, int32_t member)
      : request(item.request),
        token(p.grid.by_passes.divide(item.unit)),
        tile((item.unit - token * p.grid.passes) * p.grid.team + member),
        first_head(p.grid.tiles.first_head(tile)) {}

  __device__ bool any(const GpuParams& p) const { return tile < p.grid.tiles.num_tiles(); }
  __device__ int32_t head(int32_t row) const { return first_head + row; }
  __device__ bool valid(const GpuParams& p, int32_t row) const {
    return row < p.grid.tiles.rows() && head(row) < static_cast<int32_t>(p.h_q) && any(p);
  }
  // The first of a row's d_qk query values.
  __device__ const uint16_t* query(const GpuParams& p, int32_t row) const {
    return static_cast<const uint16_t*>(p.q) + request * p.q_stride_b + token * p.q_stride_s +
           head(row) * p.q_stride_h;
  }
  // The byte address of a row's first output element.
  __device__ uint8_t* out(const GpuParams& p, int32_t row) const {
    return static_cast<uint8_t*>(p.out) +
           2 * (request * p.out_stride_b + token * p.out_stride_s + head(row) * p.out_stride_h);
  }
  __device__ float* lse(const GpuParams& p, int32_t row) const {
    return p.lse + request * p.lse_stride_b + head(row) * p.lse_stride_h + token * p.lse_stride_s;
  }
  // Null: no sink.
  __device__ const float* sink(const GpuParams& p, int32_t row) const {
    return p.attn_sink == nullptr ? nullptr : p.attn_sink + head(row) * p.attn_sink_stride;
  }
};

// Where the merged rows of a split item go.
struct MergedRows {
  static constexpr bool kSinks = true;
  const GpuParams& p;
  const WorkItem& item;
  int32_t member;

  __device__ MergedRow row(int32_t row) const {
    const TileRows rows(p, item, member);
    if (!rows.valid(p, row)) return {};
    return {rows.out(p, row), rows.lse(p, row), rows.sink(p, row)};
  }
  __device__ float factor() const { return 1.0f; }
};

struct Op {
  using Params = GpuParams;
  using Blocks = RequestBlocks;
  using Output = MergedRows;
  static constexpr const char* kName = kOperator;
};

// ---- host ---------------------------------------------------------------------------------------

inline int64_t max_blocks(const Params& p) {
  return ceil_div(p.main.topk, kBlockKeys) + ceil_div(p.extra.topk, kBlockKeys);
}

inline DecodeGrid make_grid(const Problem& p, int64_t tile_m, int64_t max_team, int64_t ctas) {
  return decode_grid(p.b, /*s_q=*/1, p.h_q, /*h_kv=*/p.s_q, tile_m, max_team, ctas, max_blocks(p),
                     p.batch_invariant);
}

inline GpuParams gpu_params(const Problem& p, const DecodeGrid& g, const Workspace& workspace) {
  GpuParams params;
  static_cast<Params&>(params) = p;
  static_cast<DecodeLaunch&>(params) = decode_launch(g, workspace);
  const PagedKv* const caches[2] = {&p.main.kv, &p.extra.kv};
  for (int i = 0; i < 2; ++i) {
    params.pages[i] = PageDivisor::of(caches[i]->page_size);
    params.num_slots[i] = static_cast<uint32_t>(min_of(caches[i]->num_slots(), int64_t{1} << 31));
  }
  return params;
}

}  // namespace flash_mla::mla_decode_sparse
