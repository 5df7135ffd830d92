// Where the K tiles of an item lie, for the loads of load.cuh.
#pragma once

#include "device/sm90/tma.cuh"
#include "mla_decode_dense/sm90/items.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

// Where a tile lies. With pages of 64 tokens and more, it is part of a page; with smaller ones it
// has several.
struct TilePlace {
  int32_t entry;   // of block_table, of the tile's first page
  int32_t within;  // tiles before this one on its page

  __device__ TilePlace(int32_t block, int32_t page_size, int32_t boxes) {
    const int32_t page_tiles = page_size / kTileKeys;
    entry = page_tiles == 0 ? block * boxes : page_tiles == 1 ? block : block / page_tiles;
    within = page_tiles <= 1 ? 0 : block - entry * page_tiles;
  }
  __device__ int32_t offset() const { return within * kTileKeys; }  // the tile's first token on it
};

// The keys of one pass over an item. A page, or the part of it that is a tile, is a box; lane i
// knows the page of box i.
struct KeyWalk {
  static constexpr int32_t kTableAhead = 16;  // tiles

  const GpuParams& p;
  const int32_t request, kv_head;
  const int32_t first_block, num_tiles, num_keys;
  const int32_t page_size, box_keys, boxes;

  __device__ __forceinline__ KeyWalk(const GpuParams& p, const ItemPass& pass)
      : p(p),
        request(pass.rows.request),
        kv_head(pass.rows.kv_head),
        first_block(pass.first_block),
        num_tiles(pass.num_tiles),
        num_keys(pass.num_keys),
        page_size(static_cast<int32_t>(p.kv.page_size)),
        box_keys(min(page_size, kTileKeys)),
        boxes(kTileKeys / box_keys) {}

  __device__ __forceinline__ TilePlace place(int32_t tile) const {
    return {first_block + tile, page_size, boxes};
  }
  __device__ __forceinline__ int32_t first_key(int32_t tile) const {
    return (first_block + tile) * kTileKeys;
  }
  // The page of this lane's box, of the first one for lanes that have none; -1 for a page that does
  // not exist, and past the keys. It takes a load from memory: ask for it a tile ahead.
  __device__ __forceinline__ int32_t box_page(int32_t tile) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
    const int32_t box = lane < boxes ? lane : 0;
    // Nobody waits long for a later part of the table.
    if (lane == 0 && first_key(tile + kTableAhead) < num_keys) {
      asm volatile("prefetch.global.L1 [%0];" ::"l"(entry(tile + kTableAhead, 0)));
    }
    if (first_key(tile) + box * box_keys >= num_keys) return -1;
    const int32_t page = *entry(tile, box);
    return page < p.kv.num_pages ? page : -1;
  }
  // Token `token` of a page.
  __device__ __forceinline__ const uint8_t* address(int32_t page, int32_t token) const {
    return p.kv.data + page * p.kv.page_stride_bytes + token * p.kv.token_stride_bytes +
           kv_head * p.kv.head_stride_bytes;
  }
  __device__ __forceinline__ const int32_t* entry(int32_t tile, int32_t box) const {
    return p.block_table + request * p.block_table_stride_b +
           (place(tile).entry + box) * p.block_table_stride_p;
  }
  // Bit k: key k of the tile lies on a page that does not exist. From box_page() of all lanes.
  __device__ __forceinline__ uint64_t missing_keys(int32_t page) const {
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
    return missing;
  }
};

// How many tiles ahead of the loads a team asks for K in L2, its CTAs taking turns: without it, the
// latency of device memory does not fit between the release of a buffer and its next use. A CTA
// alone is bound by memory anyway and would only read twice.
inline constexpr int kPrefetchTiles = 3;

// Asks for tiles when it is this CTA's turn. By one warp, which calls next() once for each tile
// that it loads.
template <int kTokenBytes>
class Prefetch {
 public:
  __device__ __forceinline__ Prefetch(const KeyWalk& keys, int32_t member)
      : tile_(keys.p.grid.team > 1 && keys.p.kv.token_stride_bytes == kTokenBytes ? member
                                                                                  : keys.num_tiles),
        page_(keys.box_page(tile_)) {
#pragma unroll 1
    while (tile_ < kPrefetchTiles) next(keys, 0);
  }
  // When tile `tile` is being loaded.
  __device__ __forceinline__ void next(const KeyWalk& keys, int32_t tile) {
    if (tile_ > tile + kPrefetchTiles) return;
    // One request a page to the copy engine, which has enough to do: only where tokens lie
    // together.
    if (page_ >= 0 && static_cast<int32_t>(threadIdx.x) % kLanes < keys.boxes) {
      flash_mla::sm90::prefetch_bytes(keys.address(page_, keys.place(tile_).offset()),
                                      kTokenBytes * keys.box_keys);
    }
    tile_ += keys.p.grid.team;
    page_ = keys.box_page(tile_);
  }

 private:
  int32_t tile_;  // that is next to be asked for
  int32_t page_;
};

}  // namespace flash_mla::mla_decode_dense::sm90
