// The role of the producer's warps: the CTA's items, query tiles and K tiles by the copy engine.
#pragma once

#include "mla_decode_dense/sm90/config.h"
#include "mla_decode_dense/sm90/keys.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

// Dimensions of both, innermost first: 64 columns; q: head, token; kv: token of a page, or column
// block; ... see launch.cuh.
struct TensorMaps {
  CUtensorMap q;
  CUtensorMap kv_pair;  // a piece: two column blocks of 64 keys
  CUtensorMap kv_one;   // one column block of min(64, page_size) keys
};

// By the warp of loader 0; with pages of less than 64 tokens by those of the others too, which take
// turns with the pieces. `before`: tiles of earlier passes; `fills`: bit b is the parity of the
// fills of buffer b so far.
template <class Cfg>
__device__ __forceinline__ void load_keys(const KeyWalk& keys, const TensorMaps& maps,
                                          SharedStorage<Cfg>& smem, int32_t loader, int32_t before,
                                          uint32_t& fills) {
  using flash_mla::sm90::load_tile;
  constexpr int kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  constexpr bool kRope = kColumnBlocks > kVColumnBlocks;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  const bool leader = lane == 0;
  // Asked for two tiles ahead, and after the copies of a tile: those are what the tensor cores wait
  // for.
  int32_t next_page = keys.box_page(0), page_after = keys.box_page(1);
#pragma unroll 1
  for (int32_t tile = 0; tile < keys.num_tiles; ++tile) {
    const int32_t buffer = tile % kBuffers;
    const uint32_t parity = fills >> buffer & 1;
    fills ^= 1u << buffer;
    const int32_t page = keys.existing(next_page);
    const int32_t offset = keys.place(tile).offset();
    const uint64_t missing = keys.missing_keys(page);
    // In the order in which attend frees them: RoPE, then the half of V that the tile's own
    // warpgroup multiplies.
    Barrier* const full = smem.kv_full[buffer];
    const uint32_t to = flash_mla::sm90::smem_address(smem.k[buffer]);
    const int32_t first_piece = kRope ? kRopePiece : buffer * kRopePiece / 2;
    const auto in_order = [&](const auto& load_piece) {
      if constexpr (kRope) load_piece(kRopePiece, 1);
#pragma unroll
      for (int32_t i = 0; i < kRopePiece; ++i) {
        load_piece(i ^ (buffer * kRopePiece / 2), kPieceBlocks);
      }
    };
    const auto announce = [&](int32_t piece, int32_t column_blocks) {
      // The first fill passes: a fresh barrier counts as one whose phase 1 is over.
      flash_mla::sm90::wait(smem.kv_empty[buffer][piece], parity ^ 1);
      if (piece == first_piece) smem.missing_keys[buffer] = missing;
      flash_mla::sm90::arrive_expect(full[piece], column_blocks * kColumnBlockBytes);
    };
    if (keys.boxes == 1) {
      if (leader) {
        in_order([&](int32_t piece, int32_t column_blocks) {
          announce(piece, column_blocks);
          const int32_t c = piece * kPieceBlocks;
          load_tile(to + c * kColumnBlockBytes, column_blocks == 1 ? maps.kv_one : maps.kv_pair, 0,
                    offset, c, keys.kv_head, page, full[piece]);
        });
      }
    } else {  // a lane for each box of the piece
      const int32_t box = lane % keys.boxes, block = lane / keys.boxes;
      const int32_t page_of_box = __shfl_sync(kAllLanes, page, box);
      int32_t turn = 0;
      in_order([&](int32_t piece, int32_t column_blocks) {
        if (turn++ % kLoaders != loader) return;
        if (leader) announce(piece, column_blocks);
        __syncwarp();
        const int32_t c = piece * kPieceBlocks + block;
        if (block < column_blocks) {
          load_tile(to + c * kColumnBlockBytes + box * keys.box_keys * kTokenBytes, maps.kv_one, 0,
                    0, c, keys.kv_head, page_of_box, full[piece]);
        }
      });
    }
    __syncwarp();
    next_page = page_after;
    page_after = keys.box_page(tile + 2);
    if (leader && loader == 0) smem.loaded = before + tile;
  }
}

// How many tiles ahead of the loads a team asks for K in L2, its CTAs taking turns: without it, the
// latency of device memory does not fit between the release of a buffer and its next use. A CTA
// alone is bound by memory anyway and would only read twice.
inline constexpr int kPrefetchTiles = 3;

// By one warp. Not with the copy engine, where a request would be in the way of the tile's copies,
// and not by the warp that issues those.
template <class Cfg>
__device__ __forceinline__ void prefetch_keys(const KeyWalk& keys, SharedStorage<Cfg>& smem,
                                              int32_t before, int32_t member) {
  constexpr int32_t kKeyBytes = SharedStorage<Cfg>::kColumnBlocks * kTokenBytes;
  constexpr int32_t kLineBytes = 128;
  if (keys.p.grid.team == 1 || keys.p.kv.token_stride_bytes != kKeyBytes) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int32_t tile = member; tile < keys.num_tiles; tile += keys.p.grid.team) {
    const int32_t pages = keys.existing(keys.box_page(tile));
    while (before + tile > *static_cast<volatile int32_t*>(&smem.loaded) + kPrefetchTiles) {
      __nanosleep(100);
    }
    const int32_t offset = keys.place(tile).offset();
#pragma unroll 1
    for (int32_t box = 0; box < keys.boxes; ++box) {
      const int32_t page = __shfl_sync(kAllLanes, pages, box);
      if (page < 0) continue;
      const uint8_t* const from = keys.address(page, offset);
#pragma unroll 6
      for (int32_t at = lane * kLineBytes; at < keys.box_keys * kKeyBytes;
           at += kLanes * kLineBytes) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
      }
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void load(const GpuParams& p, const TensorMaps& maps,
                                     SharedStorage<Cfg>& smem, const RequestRuns<kThreads>& runs,
                                     int32_t team, int32_t member) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kConsumerThreads;
  uint32_t fills = 0;
  int32_t before = 0;
  feed_items<Cfg::v.kv>(
      p, smem.feed, runs, team, member,
      [] { flash_mla::sm90::named_barrier_sync(kLoading, kWarpgroup); },
      [&](const ItemPass& pass) {
        if (thread != kLanes) return;
        load_query(p, maps.q, smem.q, SharedStorage<Cfg>::kColumnBlocks, kColumnBlockBytes,
                   smem.feed.q_full, pass.rows);
      },
      [&](const ItemPass& pass) {
        const KeyWalk keys(p, pass);
        const int32_t loader = loader_of(thread / kLanes);
        if (loader < 0) {
          prefetch_keys(keys, smem, before, member);
        } else if (loader == 0 || keys.boxes > 1) {
          load_keys(keys, maps, smem, loader, before, fills);
        }
        before += keys.num_tiles;
      });
}

}  // namespace flash_mla::mla_decode_dense::sm90
