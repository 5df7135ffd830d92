// The role of the producer warp: plans the CTA's items, loads query tiles and K tiles.
#pragma once

#include "device/sm90/tma.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/sm90/config.h"

namespace flash_mla::mla_decode_dense::sm90 {

// Dimensions of both, innermost first: 64 columns; q: head, token; kv: token of a page, or column
// block; ... see launch.cuh.
struct TensorMaps {
  CUtensorMap q;
  CUtensorMap kv_pair;  // a piece: two column blocks of 64 keys
  CUtensorMap kv_one;   // one column block of min(64, page_size) keys
};

// Where the tiles of an item lie, one after the other. With pages of 64 tokens and more, a tile is
// part of a page; with smaller ones it has several, and each lane knows that of one box.
struct TilePlace {
  int32_t entry;   // of block_table, of the tile's first page
  int32_t within;  // tiles before this one on its page

  __device__ TilePlace(int32_t block, int32_t page_size) {
    const bool small = page_size < kTileKeys;
    const int32_t page_tiles = page_size / kTileKeys;
    entry = small ? block * (kTileKeys / page_size) : block / page_tiles;
    within = small ? 0 : block - entry * page_tiles;
  }
  __device__ void advance(int32_t page_size) {
    if (page_size < kTileKeys) {
      entry += kTileKeys / page_size;
    } else if (++within * kTileKeys == page_size) {
      within = 0;
      ++entry;
    }
  }
  __device__ int32_t offset() const { return within * kTileKeys; }  // the tile's first token on it
};

// The pages of a request, 64 entries of block_table at a time in the lanes of a warp. Indices grow.
class PageWindow {
 public:
  __device__ PageWindow(const GpuParams& p, int32_t request, int32_t num_entries, int32_t first)
      : p_(p), request_(request), num_entries_(num_entries), first_(first) {
    low_ = fetch(first);
    high_ = fetch(first + kLanes);
  }

  // Entry `index`; -1 for a page that does not exist, and past the request's last one. All lanes
  // call it, with indices less than 64 apart.
  __device__ int32_t page(int32_t index) const {
    const int32_t offset = index - first_;
    const int32_t low = __shfl_sync(kAllLanes, low_, offset % kLanes);
    const int32_t high = __shfl_sync(kAllLanes, high_, offset % kLanes);
    return offset < kLanes ? low : high;
  }
  // No index below this one will be asked for.
  __device__ void advance(int32_t index) {
    if (index < first_ + kLanes) return;
    first_ += kLanes;
    low_ = high_;
    high_ = fetch(first_ + kLanes);
  }

 private:
  __device__ int32_t fetch(int32_t first) const {
    const int32_t index = first + static_cast<int32_t>(threadIdx.x) % kLanes;
    if (index >= num_entries_) return -1;
    const int32_t page =
        p_.block_table[request_ * p_.block_table_stride_b + index * p_.block_table_stride_p];
    return page < p_.kv.num_pages ? page : -1;
  }

  const GpuParams& p_;
  int32_t request_;
  int32_t num_entries_;
  int32_t first_;
  int32_t low_, high_;
};

// Whether some key that a later token of the tile attends and an earlier one does not has a value
// of V that is not finite. By a warp.
template <class Cfg>
__device__ __forceinline__ bool has_nonfinite_late_key(const GpuParams& p, const WorkItem& item,
                                                       const TileRows& rows) {
  constexpr uint32_t kExponent = Cfg::v.kv == KvFormat::kFp16 ? 0x7c00u : 0x7f80u;
  const int32_t end = min(rows.num_keys(p), item.block_end * kTileKeys);
  bool found = false;
#pragma unroll 1
  for (int32_t key = max(rows.visible(p, 0), item.block_begin * kTileKeys); key < end; ++key) {
    const int32_t page_size = static_cast<int32_t>(p.kv.page_size);
    const int64_t page = p.block_table[item.request * p.block_table_stride_b +
                                       key / page_size * p.block_table_stride_p];
    if (!p.kv.has_page(page)) continue;
    const auto* values = reinterpret_cast<const uint4*>(p.kv.data + page * p.kv.page_stride_bytes +
                                                        key % page_size * p.kv.token_stride_bytes +
                                                        rows.kv_head * p.kv.head_stride_bytes) +
                         threadIdx.x % kLanes;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {  // 32 lanes x 16 bytes are half of 512 columns
      const uint4 four = values[half * kLanes];
      for (const uint32_t pair : {four.x, four.y, four.z, four.w}) {
        found |= (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
      }
    }
  }
  return __any_sync(kAllLanes, found);
}

// How many tiles ahead of the loads a team asks for K in L2, its CTAs taking turns: without it, the
// latency of device memory does not fit between the release of a buffer and its next use. A CTA
// alone is bound by memory anyway and would only read twice.
inline constexpr int kPrefetchTiles = 3;

template <class Cfg>
__device__ __forceinline__ void load(const GpuParams& p, const TensorMaps& maps,
                                     SharedStorage<Cfg>& smem, const RequestRuns<kThreads>& runs,
                                     int32_t team, int32_t member) {
  using flash_mla::sm90::arrive;
  using flash_mla::sm90::arrive_expect;
  using flash_mla::sm90::expect;
  using flash_mla::sm90::load_tile;
  using flash_mla::sm90::smem_address;
  using flash_mla::sm90::wait;
  constexpr int kColumnBlocks = SharedStorage<Cfg>::kColumnBlocks;
  constexpr bool kRope = kColumnBlocks > kVColumnBlocks;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  const bool leader = lane == 0;
  const RequestBlocks num_blocks{p};
  const int32_t page_size = static_cast<int32_t>(p.kv.page_size);
  const int32_t box_keys = page_size < kTileKeys ? page_size : kTileKeys;
  const int32_t boxes = kTileKeys / box_keys;  // of a tile and column block
  // One request a page to the copy engine, which has enough to do: only where tokens lie together.
  const bool prefetches = p.grid.team > 1 && p.kv.token_stride_bytes == kColumnBlocks * kTokenBytes;

  make_plan(p.grid, team, num_blocks, runs, smem.plan);
  uint32_t num_items = 0;
  uint32_t fills = 0;  // bit b: the parity of the fills of buffer b so far
#pragma unroll 1
  while (true) {
    if (leader) {
      smem.next_item = next_item(p.grid, team, smem.plan, p.list, p.num_listed, num_blocks);
    }
    __syncwarp();
    const WorkItem item = smem.next_item;
    __syncwarp();
    const bool valid = item.valid();
    const int32_t length = valid ? request_length(p, item.request) : 0;
    const TileRows rows(p, item, member, length);
    if (valid && !rows.any(p)) continue;  // the team has more CTAs than there are M tiles

    // Where a key that not all tokens of the tile attend has a value that is not finite, P = 0
    // would not keep it from the others: then each token is a pass of its own, without the later
    // keys.
    if (leader) smem.passes = 1;
    __syncwarp();
    if (valid && p.causal && rows.num_tokens(p) > 1 && has_nonfinite_late_key<Cfg>(p, item, rows)) {
      smem.passes = rows.num_tokens(p);
    }
    __syncwarp();
#pragma unroll 1
    for (int32_t pass = 0; pass < smem.passes; ++pass) {
      const bool apart = smem.passes > 1;
      const int32_t num_keys =
          apart ? rows.visible(p, pass * p.grid.tiles.heads_per_tile) : rows.num_keys(p);
      const int32_t block_end = min(item.block_end, ceil_div(num_keys, kTileKeys));
      const int32_t num_tiles = valid ? max(0, block_end - item.block_begin) : 0;
      TilePlace place(item.block_begin, page_size);
      PageWindow window(p, valid ? item.request : 0, ceil_div(num_keys, page_size), place.entry);

      if (num_items > 0) wait(smem.q_empty, (num_items - 1) % 2);
      ItemSlot& slot = smem.items[num_items % 2];
      if (leader) {
        if (num_tiles > 0) {
          expect(smem.q_full, kColumnBlocks * p.grid.tiles.rows() * kTokenBytes);
          const int32_t head = rows.kv_head * rows.group + rows.first_head;
#pragma unroll 1
          for (int32_t c = 0; c < kColumnBlocks; ++c) {
            load_tile(smem_address(smem.q) + c * kColumnBlockBytes, maps.q, 0, head,
                      rows.first_token, c, item.request, smem.q_full);
          }
        }
        slot.item = item;
        slot.item.block_end = item.block_begin + num_tiles;
        slot.length = length;
        slot.num_keys = num_keys;
        slot.only_token = apart ? rows.first_token + pass : -1;
        slot.last = pass == smem.passes - 1;
        slot.scale_log2 = valid ? logit_scale_log2(p, item.request) : 0.0f;
        // The first row is that of the earliest token.
        const int32_t whole_keys = apart ? num_keys : rows.visible(p, 0);
        slot.partial_from = slot.scale_log2 > 0.0f ? whole_keys / kTileKeys - item.block_begin : 0;
        arrive(smem.q_full);
      }
      __syncwarp();
      ++num_items;
      if (!valid) return;

      TilePlace ahead = place;
      int32_t turn = member;  // 0: this CTA's turn to prefetch
      const auto prefetch = [&](bool wanted) {
        const int32_t page = window.page(ahead.entry + (lane < boxes ? lane : 0));
        if (wanted && turn == 0 && page >= 0 && lane < boxes) {
          flash_mla::sm90::prefetch_bytes(p.kv.data + page * p.kv.page_stride_bytes +
                                              ahead.offset() * p.kv.token_stride_bytes +
                                              rows.kv_head * p.kv.head_stride_bytes,
                                          kColumnBlocks * kTokenBytes * box_keys);
        }
        ahead.advance(page_size);
        turn = turn == 0 ? p.grid.team - 1 : turn - 1;
      };
      if (prefetches) {
#pragma unroll 1
        for (int32_t tile = 0; tile < kPrefetchTiles; ++tile) prefetch(tile < num_tiles);
      }
      int32_t next_page = window.page(place.entry + (lane < boxes ? lane : 0));
#pragma unroll 1
      for (int32_t tile = 0; tile < num_tiles; ++tile) {
        const int32_t buffer = tile % kBuffers;
        const uint32_t parity = fills >> buffer & 1;
        fills ^= 1u << buffer;
        const int32_t page = next_page;
        const int32_t offset = place.offset();
        uint64_t missing = 0;
        if (__any_sync(kAllLanes, page < 0)) {
#pragma unroll 1
          for (int32_t box = 0; box < boxes; ++box) {
            if (__shfl_sync(kAllLanes, page, box) < 0) {
              missing |= (boxes == 1 ? ~uint64_t{0} : (uint64_t{1} << box_keys) - 1)
                         << (box * box_keys);
            }
          }
        }
        // In the order in which attend frees them: RoPE, then the half of V that the tile's own
        // warpgroup multiplies.
        Barrier* const full = smem.kv_full[buffer];
        const uint32_t to = smem_address(smem.k[buffer]);
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
          wait(smem.kv_empty[buffer][piece], parity ^ 1);
          if (piece == first_piece) smem.missing_keys[buffer] = missing;
          arrive_expect(full[piece], column_blocks * kColumnBlockBytes);
        };
        if (boxes == 1) {
          if (leader) {
            in_order([&](int32_t piece, int32_t column_blocks) {
              announce(piece, column_blocks);
              const int32_t c = piece * kPieceBlocks;
              load_tile(to + c * kColumnBlockBytes, column_blocks == 1 ? maps.kv_one : maps.kv_pair,
                        0, offset, c, rows.kv_head, page, full[piece]);
            });
          }
        } else {  // a lane for each box of the piece
          const int32_t box = lane % boxes, block = lane / boxes;
          const int32_t box_page = __shfl_sync(kAllLanes, page, box);
          in_order([&](int32_t piece, int32_t column_blocks) {
            if (leader) announce(piece, column_blocks);
            __syncwarp();
            const int32_t c = piece * kPieceBlocks + block;
            if (block < column_blocks) {
              load_tile(to + c * kColumnBlockBytes + box * box_keys * kTokenBytes, maps.kv_one, 0,
                        0, c, rows.kv_head, box_page, full[piece]);
            }
          });
        }
        __syncwarp();
        if (prefetches) prefetch(tile + kPrefetchTiles < num_tiles);
        place.advance(page_size);
        window.advance(place.entry);
        next_page = window.page(place.entry + (lane < boxes ? lane : 0));
      }
    }
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90
