// The role of loading: a warp gathers its slab of K, 32 tokens at a time, beside its other work,
// and makes a tile of what needs it.
#pragma once

#include <cstdint>
#include <limits>

#include "device/portable/copy.cuh"
#include "device/sm80/cp_async.cuh"
#include "mla_decode_sparse/gpu.cuh"
#include "mla_decode_sparse/portable/config.h"
#include "mla_decode_sparse/portable/dequant.cuh"

namespace flash_mla::mla_decode_sparse::portable {

// The entries of an item: of the main indices, then of the extra ones. A tile is of one of both.
struct ItemKeys {
  static constexpr uint32_t begin = 0;  // keys are numbered in the order of their tiles
  int32_t main_begin, main_end;         // nothing where the end is not beyond the beginning
  int32_t extra_begin, extra_end;

  __device__ ItemKeys(const GpuParams& p, const WorkItem& item, const TileRows&) {
    const int32_t main = num_tokens(p.main, item.request);
    const int32_t main_blocks = ceil_div(main, kBlockKeys);
    main_begin = item.block_begin * kBlockKeys;
    main_end = min(main, item.block_end * kBlockKeys);
    extra_begin = max(0, item.block_begin - main_blocks) * kBlockKeys;
    extra_end = min(num_tokens(p.extra, item.request), (item.block_end - main_blocks) * kBlockKeys);
  }
  __device__ int32_t num_tiles() const {
    return tiles(main_begin, main_end) + tiles(extra_begin, extra_end);
  }

 private:
  static __device__ int32_t tiles(int32_t begin, int32_t end) {
    return max(0, end - begin + kTileKeys - 1) / kTileKeys;
  }
};

// Walks the tiles of one item after the other. Lane k looks up entry k of a tile: it reads the
// indices one tile ahead and hands the token's address to the lanes that copy it.
template <class Cfg>
class Loader {
  using C = typename Shape<Cfg>::Config;
  using SharedStorage = typename Shape<Cfg>::SharedStorage;
  static constexpr KvLayout kLayout = kv_layout(Cfg::v.kv);
  static constexpr int kGroupKeys = C::kGroupKeys;
  static constexpr int kLanesPerKey = 16;  // of a converting warp: 8 columns each

 public:
  static constexpr bool kPrepares = kLayout.packed();

  __device__ __forceinline__ Loader(const GpuParams& p, SharedStorage& smem)
      : p_(p),
        smem_(smem),
        warp_(static_cast<int>(threadIdx.x) / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes) {}

  // The item's tiles are all under way.
  __device__ __forceinline__ bool done() const { return entry_ - lane_ >= end_; }

  __device__ __forceinline__ void start(const WorkItem& item) {
    const TileRows rows(p_, item, /*member=*/0);
    const ItemKeys keys(p_, item, rows);
    request_ = rows.request;
    token_ = rows.token;
    extra_begin_ = keys.extra_begin;
    extra_end_ = keys.extra_end;
    enter(/*extra=*/false, keys.main_begin, keys.main_end);
    look_up();
  }

  // Copies the next tile to stage `stage`, as one group of this thread's copies.
  __device__ __forceinline__ void issue(int stage) {
    const PagedKv& kv = set().kv;
    const bool valid = kv.has_slot(slot_);
    const uint32_t valid_keys = __ballot_sync(kAllLanes, valid);
    const uint32_t slot = valid ? static_cast<uint32_t>(slot_) : 0;
    // No slot lies beyond a page of 2^31 tokens.
    const auto page_size = static_cast<uint32_t>(min_of(kv.page_size, int64_t{1} << 31));
    const uint32_t page = slot / page_size, offset = slot - page * page_size;
    constexpr KvLayout layout = kLayout;
    const uint8_t* const token = kv.row(layout, page, offset, 0);
    if constexpr (C::kConverts) {
      copy_raw(token, kv.scales(layout, page, offset), valid, valid_keys, stage);
    } else {
      if (lane_ == 0) smem_.valid_keys[warp_][stage] = valid_keys;
      flash_mla::portable::copy_slab<C>(token, valid_keys,
                                        flash_mla::sm80::smem_address(smem_.slabs[slab()][stage]),
                                        lane_, slab(), group());
    }
    flash_mla::sm80::commit_copies();
    entry_ += kTileKeys;
    look_up();
  }

  // Of the keys that the warp has loaded. Its lanes must meet before others, or the stage's next
  // copies, may touch them.
  __device__ __forceinline__ void prepare(int stage) {
    if constexpr (C::kConverts) {
      convert(stage);
    } else {
      mark_nans(stage);
    }
  }

 private:
  __device__ __forceinline__ int slab() const { return warp_ % kSlabs; }
  __device__ __forceinline__ int group() const { return warp_ / kSlabs; }
  __device__ __forceinline__ int first_key() const { return group() * kGroupKeys; }
  __device__ __forceinline__ const TokenSet& set() const { return extra_ ? p_.extra : p_.main; }

  __device__ __forceinline__ void enter(bool extra, int32_t begin, int32_t end) {
    extra_ = extra;
    entry_ = begin + lane_;
    end_ = end;
  }

  // The slot of the lane's next entry, in the extra set once the main one is through.
  __device__ __forceinline__ void look_up() {
    if (done() && !extra_) enter(/*extra=*/true, extra_begin_, extra_end_);
    slot_ = -1;
    if (entry_ < end_) {
      const TokenSet& from = set();
      slot_ = __ldg(from.indices + request_ * from.indices_stride_b +
                    token_ * from.indices_stride_s + entry_ * from.indices_stride_k);
    }
  }

  // kBytes of each of the warp's keys, from byte `offset` of a token on, to rows of row_bytes.
  template <int kBytes>
  __device__ __forceinline__ void copy_rows(const uint8_t* token, int offset, uint32_t valid_keys,
                                            uint32_t to, int row_bytes) const {
    constexpr int kLanesOfRow = kBytes / 16;
    const int part = lane_ % kLanesOfRow * 16;
#pragma unroll
    for (int i = 0; i < kGroupKeys * kLanesOfRow / kLanes; ++i) {
      const int key = first_key() + i * (kLanes / kLanesOfRow) + lane_ / kLanesOfRow;
      const uint8_t* from = flash_mla::portable::token_of_lane(token, key) + offset + part;
      flash_mla::sm80::copy_16(to + key * row_bytes + part, from, (valid_keys >> key & 1) != 0);
    }
  }

  // The lane's token, its scales in the format of the main cache, and whether there is one.
  __device__ __forceinline__ void copy_raw(const uint8_t* token, const uint8_t* token_scales,
                                           bool valid, uint32_t valid_keys, int stage) {
    using flash_mla::sm80::smem_address;
    using Raw = RawStage<Cfg::v.kv>;
    Raw& raw = smem_.raw[stage];
    const bool is_e2m1 = Raw::kTakesE2m1 && set().kv.format == KvFormat::kV41Fp4;
    if (lane_ == 0) raw.notes[warp_] = {valid_keys, is_e2m1};

    const uint32_t values = smem_address(raw.slab_values(slab()));
    const uint32_t scales = smem_address(raw.scales[slab()][lane_]);
    const bool own = lane_ / kGroupKeys == group();
    if (is_e2m1) {
      copy_rows<kSlabCols / 2>(token, slab() * (kSlabCols / 2), valid_keys, values, Raw::kRowBytes);
      const uint8_t* const from =
          token + Raw::kE2m1Layout.scales_offset_bytes + slab() * Raw::kScaleBytes;
      static_assert(!Raw::kTakesE2m1 || Raw::kScaleBytes == 8);
      if (own) flash_mla::sm80::copy_8(scales, from, valid);
      return;
    }
    copy_rows<kSlabCols>(token, slab() * kSlabCols, valid_keys, values, Raw::row_bytes(slab()));
    if constexpr (Raw::kRopeCols > 0) {
      if (Raw::has_rope(slab())) {
        copy_rows<Raw::kRopeCols>(token, kSlabs * kSlabCols, valid_keys, values + kSlabCols,
                                  Raw::row_bytes(slab()));
      }
    }
    if (own) flash_mla::sm80::copy_4(scales, token_scales + scale(0) / 4 * 4, valid);
  }

  // Of a token's scales, that of column `column` of the slab.
  __device__ __forceinline__ int scale(int column) const {
    return (slab() * kSlabCols + column) / kLayout.scale_tile;
  }

  // What load(key) gives, to store(key, value), for each of the warp's keys: every second one is
  // the lane's. In batches, since the compiler cannot know that stores do not touch what is loaded.
  template <class Load, class Store>
  __device__ __forceinline__ void for_keys(const Load& load, const Store& store) const {
    constexpr int kStep = kLanes / kLanesPerKey, kBatch = 4;
    static_assert(kGroupKeys % (kBatch * kStep) == 0);
    const int first = first_key() + lane_ / kLanesPerKey;
#pragma unroll 1
    for (int i = first; i < first + kGroupKeys; i += kBatch * kStep) {
      decltype(load(i)) values[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) values[k] = load(i + k * kStep);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) store(i + k * kStep, values[k]);
    }
  }

  // Raw stage `stage` to the tile.
  __device__ __forceinline__ void convert(int stage) {
    using Raw = RawStage<Cfg::v.kv>;
    Raw& raw = smem_.raw[stage];
    const typename Raw::Note note = raw.notes[warp_];
    if (lane_ == 0) smem_.valid_keys[warp_][0] = note.valid_keys;

    const int chunk = lane_ % kLanesPerKey;
    const int row_bytes = Raw::row_bytes(slab());
    const uint8_t* const values = raw.slab_values(slab());
    uint8_t* const tile = smem_.slabs[slab()][0] + chunk * 16;
    const auto to = [&](int key) { return reinterpret_cast<uint4*>(tile + key * C::kRowBytes); };

    if (Raw::kTakesE2m1 && note.is_e2m1) {
      struct Chunk {
        uint32_t codes;
        uint8_t scale;
      };
      const int scale_byte = chunk * 8 / Raw::kE2m1Layout.scale_tile;
      const auto load = [&](int key) -> Chunk {
        return {*reinterpret_cast<const uint32_t*>(values + key * row_bytes + chunk * 4),
                raw.scales[slab()][key][scale_byte]};
      };
      for_keys(load, [&](int key, Chunk c) { *to(key) = e2m1_to_bf16(c.codes, c.scale); });
      return;
    }
    constexpr int kRopeChunk = (kSlabCols - Raw::kRopeCols) / 8;
    if (Raw::has_rope(slab()) && chunk >= kRopeChunk) {
      const uint8_t* const rope = values + kRopeChunk * 8 + (chunk - kRopeChunk) * 16;
      const auto load = [&](int key) {
        return *reinterpret_cast<const uint4*>(rope + key * row_bytes);
      };
      for_keys(load, [&](int key, uint4 columns) { *to(key) = columns; });
      return;
    }
    struct Chunk {
      uint2 codes;
      uint32_t scale;
    };
    const int scale_byte = scale(chunk * 8) - scale(0) / 4 * 4;
    const auto load = [&](int key) -> Chunk {
      return {*reinterpret_cast<const uint2*>(values + key * row_bytes + chunk * 8),
              raw.scales[slab()][key][scale_byte]};
    };
    uint32_t nans = 0, largest_scale = 0;
    for_keys(load, [&](int key, Chunk c) {
      *to(key) = e4m3_to_bf16(c.codes, ue8m0_factor(c.scale));
      nans |= e4m3_nans(c.codes.x) | e4m3_nans(c.codes.y);
      largest_scale = max(largest_scale, c.scale);
    });
    if (nans == 0 && largest_scale <= kLargestQuickScale) return;
    for_keys(load, [&](int key, Chunk c) {
      e4m3_to_bf16_by_definition(c.codes, c.scale, reinterpret_cast<uint16_t*>(to(key)));
    });
  }

  // The products take NaN codes for +-480. A token that has one gets a NaN for a scale.
  __device__ __forceinline__ void mark_nans(int stage) {
    static_assert(!kPrepares || C::kConverts || (C::kTokenScales && C::kSlabBytes == kSlabCols));
    constexpr int kLanesOfRow = kSlabCols / 16;
    uint8_t* const tile = smem_.slabs[slab()][stage];
    const auto nans = [](const uint8_t* codes) {
      const uint4 c = *reinterpret_cast<const uint4*>(codes);
      return e4m3_nans(c.x) | e4m3_nans(c.y) | e4m3_nans(c.z) | e4m3_nans(c.w);
    };
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kGroupKeys; i += kLanes / kLanesOfRow) {
      const int key = first_key() + i + lane_ / kLanesOfRow;
      found |= nans(tile + key * C::kRowBytes + lane_ % kLanesOfRow * 16);
    }
    if (!__any_sync(kAllLanes, found != 0) || lane_ / kGroupKeys != group()) return;
    uint8_t* const own = tile + lane_ * C::kRowBytes;
    found = 0;
#pragma unroll 1
    for (int i = 0; i < kSlabCols; i += 16) found |= nans(own + i);
    if (found != 0) {
      *reinterpret_cast<float*>(own + C::kScaleOffsetBytes) =
          std::numeric_limits<float>::quiet_NaN();
    }
  }

  const GpuParams& p_;
  SharedStorage& smem_;
  const int warp_, lane_;

  int32_t request_ = 0;
  int32_t token_ = 0;
  int32_t extra_begin_ = 0, extra_end_ = 0;
  // The next tile: of which set, this lane's entry in it, where the item's entries end, the slot.
  bool extra_ = false;
  int32_t entry_ = static_cast<int32_t>(threadIdx.x) % kLanes;
  int32_t end_ = 0;
  int32_t slot_ = -1;
};

}  // namespace flash_mla::mla_decode_sparse::portable
