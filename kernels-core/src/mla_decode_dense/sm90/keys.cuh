// What the loads of both kernels have in common: 16-bit queries, and where the K tiles of an item
// lie.
#pragma once

#include "device/sm90/tma.cuh"
#include "mla_decode_dense/sm90/items.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

// An M tile of 16-bit queries, in blocks of 64 columns. By one thread.
__device__ __forceinline__ void load_query(const GpuParams& p, const CUtensorMap& map, uint8_t* q,
                                           int32_t blocks, int32_t block_bytes, Barrier& full,
                                           const TileRows& rows) {
  constexpr int32_t kRowBytes = 128;
  flash_mla::sm90::expect(full, blocks * p.grid.tiles.rows() * kRowBytes);
  const int32_t head = rows.kv_head * rows.group + rows.first_head;
#pragma unroll 1
  for (int32_t c = 0; c < blocks; ++c) {
    flash_mla::sm90::load_tile(flash_mla::sm90::smem_address(q) + c * block_bytes, map, 0, head,
                               rows.first_token, c, rows.request, full);
  }
}

// Rows that no copy writes: what they hold must not look like growing maxima. By all threads.
__device__ __forceinline__ void clear_query_rows(uint8_t* q, int32_t blocks, int32_t block_bytes,
                                                 int32_t rows) {
  constexpr int32_t kRowBytes = 128, kChunks = kRowBytes / 16;
  const int32_t chunks = block_bytes / 16 - rows * kChunks;  // of a block
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < blocks * chunks; i += kThreads) {
    *reinterpret_cast<uint4*>(q + i / chunks * block_bytes + rows * kRowBytes + i % chunks * 16) =
        make_uint4(0, 0, 0, 0);
  }
  flash_mla::sm90::fence_async_proxy();
}

// Which loader of keys a warp of the producer is; -1: the second one, which has queries to load.
// One is enough for pages of 64 tokens and more; smaller ones take many requests to the copy
// engine.
inline constexpr int kLoaders = kWarpgroupWarps - 1;
__device__ __forceinline__ int32_t loader_of(int32_t warp) {
  return warp == 0 ? 0 : warp == 1 ? -1 : warp - 1;
}

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
  // The page of this lane's box, of the first one for lanes that have none; -1 past the keys. It
  // takes a load from memory: ask for it early, and do nothing with it before existing(),
  // or the warp waits at once.
  __device__ __forceinline__ int32_t box_page(int32_t tile) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
    const int32_t box = lane < boxes ? lane : 0;
    // Nobody waits long for a later part of the table.
    if (lane == 0 && first_key(tile + kTableAhead) < num_keys) {
      asm volatile("prefetch.global.L1 [%0];" ::"l"(entry(tile + kTableAhead, 0)));
    }
    return first_key(tile) + box * box_keys < num_keys ? *entry(tile, box) : -1;
  }
  // -1 for a page that does not exist.
  __device__ __forceinline__ int32_t existing(int32_t page) const {
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
  // Bit k: key k of the tile lies on a page that does not exist. From existing() of all lanes.
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

}  // namespace flash_mla::mla_decode_dense::sm90
