// The role of the producer warpgroup: the CTA's items; queries, which three warps convert to fp16
// for float8 caches; tokens, copied as they are by the copy engine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/sm90/query.cuh"
#include "mla_decode_dense/sm90/keys.cuh"
#include "mla_decode_dense/sm90/transposed/config.h"

namespace flash_mla::mla_decode_dense::sm90::transposed {

// Dimensions, innermost first. q: as in the other kernel. Others: bytes or columns of a block;
// token of a page; block; key head; page.
struct TensorMaps {
  CUtensorMap q;     // 16-bit
  CUtensorMap keys;  // float8: without RoPE
  CUtensorMap rope;
  CUtensorMap scales;
};

using flash_mla::sm90::halves_of_codes;
using flash_mla::sm90::write_query;

template <class Cfg>
__device__ __forceinline__ const uint8_t* query_row(const GpuParams& p, const TileRows& rows,
                                                    int32_t row) {
  constexpr int kBytes = Cfg::v.q == DType::kFloat8E4M3 ? 1 : 2;
  if (!rows.valid(p, row)) return nullptr;
  return static_cast<const uint8_t*>(p.q) +
         kBytes * (rows.request * p.q_stride_b + rows.token(p, row) * p.q_stride_s +
                   rows.head(p, row) * p.q_stride_h);
}

// A float8 query row times `sign`; `from` null: zeros.
template <class Cfg>
__device__ __forceinline__ void load_query_codes(const uint8_t* from, SharedStorage<Cfg>& smem,
                                                 int32_t row, int32_t t, float sign) {
  using C = Config<Cfg>;
#pragma unroll 3
  for (int c = 0; c < C::kColumnBlocks; ++c) {
    uint4 codes = make_uint4(0, 0, 0, 0);
    if (from != nullptr) {
      codes = *reinterpret_cast<const uint4*>(from + c * kColumnsPerStep + t * 16);
    }
    const uint32_t four[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t two = halves_of_codes(four[i / 2] >> (i % 2 * 16));
      words[i] = flash_mla::sm90::times(two, __float2half2_rn(sign));
    }
    write_query(smem.q + c * C::kQueryBlockBytes, row, t, words);
  }
}

// By the producer's warps but the first.
inline constexpr int kQueryThreads = kWarpgroup - kLanes;

// Query rows, and the factors of their logits.
template <class Cfg>
__device__ __forceinline__ void convert_query(const GpuParams& p, SharedStorage<Cfg>& smem,
                                              const ItemPass& pass) {
  using C = Config<Cfg>;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kConsumerThreads - kLanes;
  const float scale = logit_scale_log2(p, pass.rows.request);
  const auto address_of = [&](int32_t row) { return query_row<Cfg>(p, pass.rows, row); };
  const auto factor_of = [&](int32_t row) -> float& {
    return smem.query_factor[pass.index % 2][row];
  };
  if constexpr (Cfg::v.q == DType::kFloat8E4M3) {
    const float sign = flash_mla::sm90::query_sign(scale);
#pragma unroll 1
    for (int32_t row = thread / 4; row < C::kRows; row += kQueryThreads / 4) {
      load_query_codes(address_of(row), smem, row, thread % 4, sign);
      if (thread % 4 == 0) factor_of(row) = flash_mla::sm90::logit_factor(scale, 1.0f);
    }
  } else {
    // These warps have few registers.
    flash_mla::sm90::load_query_rows<C::kRows, kQueryThreads, C::kColumnBlocks,
                                     C::kRopeBf16 ? 1 : 0, /*kAtOnce=*/1>(smem.q, thread, scale,
                                                                          address_of, factor_of);
  }
  flash_mla::sm90::fence_async_proxy();
  flash_mla::sm90::named_barrier_sync(kQueryWritten, kQueryThreads);
}

// By the warp of loader 0; 16-bit tokens, with pages of less than 64, by those of the others too.
// `fill`: stages filled so far.
template <class Cfg>
__device__ __forceinline__ void load_keys(const KeyWalk& keys, const TensorMaps& maps,
                                          SharedStorage<Cfg>& smem, int32_t loader,
                                          uint32_t& fill) {
  using C = Config<Cfg>;
  using flash_mla::sm90::load_tile;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  int32_t next_page = keys.box_page(0), page_after = keys.box_page(1);
#pragma unroll 1
  for (int32_t tile = 0; tile < keys.num_tiles; ++tile, ++fill) {
    const uint32_t stage = fill % C::kStages;
    const int32_t page = keys.existing(next_page);
    const uint64_t missing = keys.missing_keys(page);
    Barrier(&full)[C::kPieces] = smem.kv_full[stage];
    if (lane == 0) {
      flash_mla::sm90::wait(smem.kv_empty[stage], (fill / C::kStages & 1) ^ 1);
      if (loader == 0) {
        smem.missing_keys[stage] = missing;
#pragma unroll
        for (Barrier& barrier : full) {
          flash_mla::sm90::arrive_expect(barrier, C::kStageBytes / C::kPieces);
        }
      }
    }
    __syncwarp();
    const uint32_t to = flash_mla::sm90::smem_address(smem.k[stage]);
    const int32_t token = keys.place(tile).offset();
    const int32_t first = lane * keys.box_keys;  // of the lane's box
    if (keys.boxes == 1) {
      if (lane == 0) {
#pragma unroll
        for (int32_t piece = 0; piece < C::kPieces; ++piece) {
          const int32_t block = piece * C::kPieceBlocks;
          load_tile(to + block * C::kBlockBytes, maps.keys, 0, token, block, keys.kv_head, page,
                    full[piece]);
        }
      }
    } else {
      const int32_t loaders = C::kCodes ? 1 : kLoaders;
      for (int32_t block = loader; block < C::kKeyBlocks; block += loaders) {
        if (lane < keys.boxes) {
          load_tile(to + block * C::kBlockBytes + first * 128, maps.keys, 0, token, block,
                    keys.kv_head, page, full[block / C::kPieceBlocks]);
        }
      }
    }
    if (lane < keys.boxes) {
      if constexpr (C::kRope && C::kCodes) {
        load_tile(to + C::kLatentBytes + first * C::kRopeRowBytes, maps.rope, 0, token, 0,
                  keys.kv_head, page, full[0]);
      }
      if constexpr (C::kScaled) {
        load_tile(to + C::kLatentBytes + C::kRopeBytes + first * (C::kScales * 4), maps.scales, 0,
                  token, 0, keys.kv_head, page, full[0]);
      }
    }
    __syncwarp();
    next_page = page_after;
    page_after = keys.box_page(tile + 2);
  }
}

template <class Cfg>
__device__ __forceinline__ void load(const GpuParams& p, const TensorMaps& maps,
                                     SharedStorage<Cfg>& smem, const RequestRuns<kThreads>& runs,
                                     int32_t team, int32_t member) {
  using C = Config<Cfg>;
  uint32_t fill = 0;
  feed_items<Cfg::v.kv>(
      p, smem.feed, runs, team, member,
      [] { flash_mla::sm90::named_barrier_sync(kLoading, kWarpgroup); },
      [&](const ItemPass& pass) {
        if constexpr (C::kCodes) {
          convert_query(p, smem, pass);
        } else if (threadIdx.x == kConsumerThreads + kLanes) {
          load_query(p, maps.q, smem.q, C::kColumnBlocks, C::kQueryBlockBytes, smem.feed.q_full,
                     pass.rows);
        }
      },
      [&](const ItemPass& pass) {
        const KeyWalk keys(p, pass);
        const int32_t loader = loader_of((threadIdx.x - kConsumerThreads) / kLanes);
        if (loader == 0 || (loader > 0 && !C::kCodes && keys.boxes > 1)) {
          load_keys(keys, maps, smem, loader, fill);
        }
      });
}

}  // namespace flash_mla::mla_decode_dense::sm90::transposed
