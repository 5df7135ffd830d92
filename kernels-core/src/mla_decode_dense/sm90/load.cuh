// The role of two producer warps: the CTA's items, query tiles and K tiles by the copy engine.
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

// By one thread.
template <class Cfg>
__device__ __forceinline__ void load_query(const GpuParams& p, const TensorMaps& maps,
                                           SharedStorage<Cfg>& smem, const TileRows& rows) {
  constexpr int kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  Barrier& full = smem.feed.q_full;
  flash_mla::sm90::expect(full, kColumnBlocks * p.grid.tiles.rows() * kTokenBytes);
  const int32_t head = rows.kv_head * rows.group + rows.first_head;
#pragma unroll 1
  for (int32_t c = 0; c < kColumnBlocks; ++c) {
    flash_mla::sm90::load_tile(flash_mla::sm90::smem_address(smem.q) + c * kColumnBlockBytes,
                               maps.q, 0, head, rows.first_token, c, rows.request, full);
  }
}

// `fills`: bit b is the parity of the fills of buffer b so far.
template <class Cfg>
__device__ __forceinline__ void load_keys(const KeyWalk& keys, const TensorMaps& maps,
                                          SharedStorage<Cfg>& smem, int32_t member,
                                          uint32_t& fills) {
  using flash_mla::sm90::load_tile;
  constexpr int kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  constexpr bool kRope = kColumnBlocks > kVColumnBlocks;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  const bool leader = lane == 0;
  int32_t next_page = keys.box_page(0);
  Prefetch<kColumnBlocks * kTokenBytes> prefetch(keys, member);
#pragma unroll 1
  for (int32_t tile = 0; tile < keys.num_tiles; ++tile) {
    const int32_t buffer = tile % kBuffers;
    const uint32_t parity = fills >> buffer & 1;
    fills ^= 1u << buffer;
    const int32_t page = next_page;
    next_page = keys.box_page(tile + 1);
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
      in_order([&](int32_t piece, int32_t column_blocks) {
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
    prefetch.next(keys, tile + 1);
  }
}

template <class Cfg>
__device__ __forceinline__ void load(const GpuParams& p, const TensorMaps& maps,
                                     SharedStorage<Cfg>& smem, const RequestRuns<kThreads>& runs,
                                     int32_t team, int32_t member) {
  const bool leader = threadIdx.x % kLanes == 0;
  uint32_t fills = 0;
  feed_items<Cfg::v.kv>(
      p, smem.feed, runs, team, member,
      [] { flash_mla::sm90::named_barrier_sync(kLoading, kLoadWarps * kLanes); },
      [&](const ItemPass& pass) {
        if (leader) load_query(p, maps, smem, pass.rows);
      },
      [&](const ItemPass& pass) { load_keys(KeyWalk(p, pass), maps, smem, member, fills); });
}

}  // namespace flash_mla::mla_decode_dense::sm90
