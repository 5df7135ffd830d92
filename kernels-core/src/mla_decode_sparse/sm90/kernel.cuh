// Token-sparse MLA decode on Hopper.
//
//   out[r] = sink_factor * sum_j softmax_j(scale q[r].k[j]) k[j][0:512]
//                   for the 16, 32 or 64 heads r of an M tile, and the tokens j that a query names
//
// Tile: these rows x 64 tokens. Tokens come into shared memory as they are in the cache, a row at a
// time. The products are transposed, so that codes are converted to fp16 in the registers that the
// products read, once as K and once as V. bf16 tokens need no conversion.
//
//   warps  registers  role (64 rows; with fewer 152, 144, 56)
//   0-3    168, 176   values: P V of all tiles, columns 0-255 of O
//   4-7    168, 176   values: columns 256-511
//   8-11   136, 120   keys: queries; Q K^T and softmax of all tiles
//   12-15  40         the CTA's items (warp 12); tokens by the copy engine
//
// Shared memory: Q 16 to 72 KB, P 4 to 16 KB, three or four stages of tokens, 34 to 42 KB each
// (bf16: two, 66 to 74 KB).
//
//   barrier        arrivals                              phase
//   kv_full[s]     4 warps that load + bytes             fill of stage s
//   kv_empty[s]    4 warps of keys, 8 of values          fill of stage s
//   p_full[b]      4 warps of keys: P written            tile of buffer b
//   p_empty[b]     8 warps of values                     tile of buffer b
//   item_full[i]   1: the item is in slot i              item of slot i
//   rows_done[i]   4 warps of keys                       item of slot i
//   item_empty[i]  16 warps are done with the item       item of slot i
#pragma once

#include "device/sm90/bulk.cuh"
#include "mla_decode_sparse/sm90/keys.cuh"
#include "mla_decode_sparse/sm90/load.cuh"
#include "mla_decode_sparse/sm90/store.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

// The next item of which this CTA has rows, in the slot; an invalid one after the last. By one
// thread.
__device__ __forceinline__ void next_slot(const GpuParams& p, PlanStorage& plan, int32_t team,
                                          int32_t member, ItemSlot& slot) {
  const RequestBlocks num_blocks{p};
  WorkItem item;
  do {
    item = next_item(p.grid, team, plan, p.list, p.num_listed, num_blocks);
  } while (item.valid() && !TileRows(p, item, member).any(p));
  slot.item = item;
  slot.num_tiles = item.block_end - item.block_begin;
  if (!item.valid()) return;
  slot.num_tokens[0] = num_tokens(p.main, item.request);
  slot.num_tokens[1] = num_tokens(p.extra, item.request);
  const int32_t main_blocks = ceil_div(slot.num_tokens[0], kBlockKeys);
  slot.main_tiles = max(0, min(slot.num_tiles, main_blocks - item.block_begin));
  slot.first_token[0] = item.block_begin * kTileKeys;
  slot.first_token[1] = (item.block_begin - main_blocks) * kTileKeys;
  const TileRows rows(p, item, member);
  slot.entries[0] = p.main.indices + rows.request * p.main.indices_stride_b +
                    rows.token * p.main.indices_stride_s;
  slot.entries[1] = p.extra.indices + rows.request * p.extra.indices_stride_b +
                    rows.token * p.extra.indices_stride_s;
  slot.fp4 = p.extra.kv.format == KvFormat::kV41Fp4;
}

// Into L2, where keys will look for them; by a warp for every fourth row.
template <class Cfg>
__device__ __forceinline__ void prefetch_queries(const GpuParams& p, const WorkItem& item,
                                                 int32_t member) {
  constexpr int32_t kLine = 128;
  const TileRows rows(p, item, member);
  const Place at;
#pragma unroll 1
  for (int32_t row = at.warp; row < Config<Cfg>::kRows; row += kWarpgroupWarps) {
    if (!rows.valid(p, row) || at.lane * kLine >= Cfg::v.d_qk * 2) continue;
    flash_mla::sm90::prefetch_l2(reinterpret_cast<const uint8_t*>(rows.query(p, row)) +
                                 at.lane * kLine);
  }
}

// The first warp plans items too, each while the tiles of the one before are attended.
template <class Cfg>
__device__ __forceinline__ void load_role(const GpuParams& p, SharedStorage<Cfg>& smem,
                                          const RequestRuns<kThreads>& runs, int32_t team,
                                          int32_t member) {
  const Place at;
  if (at.warp == 0) make_plan(p.grid, team, RequestBlocks{p}, runs, smem.plan);
  TokenLoader<Cfg> loader(p, smem);
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const uint32_t i = index % 2, phase = index / 2 % 2;
    const volatile ItemSlot& slot = smem.slots[i];
    if (at.warp == 0 && at.lane == 0) {
      flash_mla::sm90::wait(smem.item_empty[i], phase ^ 1);
      next_slot(p, smem.plan, team, member, smem.slots[i]);
      flash_mla::sm90::arrive(smem.item_full[i]);
    }
    __syncwarp();
    flash_mla::sm90::wait(smem.item_full[i], phase);
    if (uniform(slot.item.request) < 0) break;
    prefetch_queries<Cfg>(p, smem.slots[i].item, member);
    loader.load(slot);
    flash_mla::sm90::arrive_warp(smem.item_empty[i]);
  }
}

template <class Cfg>
__device__ __forceinline__ void keys_role(const GpuParams& p, SharedStorage<Cfg>& smem,
                                          int32_t member) {
  Keys<Cfg> keys(smem);
  uint32_t first = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const uint32_t i = index % 2;
    const volatile ItemSlot& slot = smem.slots[i];
    flash_mla::sm90::wait(smem.item_full[i], index / 2 % 2);
    const WorkItem& item = smem.slots[i].item;
    if (uniform(slot.item.request) < 0) break;
    const int32_t tiles = uniform(slot.num_tiles);
    keys.load_queries(p, TileRows(p, item, member));
    keys.attend(i, first, tiles);
    keys.finish(p, TileRows(p, item, member), item, member, i);
    first += tiles;
  }
}

template <class Cfg>
__device__ __forceinline__ void values_role(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                            int32_t member) {
  using C = Config<Cfg>;
  Values<Cfg> values(smem, wg);
  uint32_t first = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const uint32_t i = index % 2, phase = index / 2 % 2;
    flash_mla::sm90::wait(smem.item_full[i], phase);
    if (uniform(smem.slots[i].item.request) < 0) break;
    const int32_t tiles = uniform(smem.slots[i].num_tiles);
    const uint32_t end = first + tiles;
    values.clear();
    const uint32_t fp4_from = first + e4m3_tiles<Cfg>(smem.slots[i], tiles);
#pragma unroll 1
    for (uint32_t tile = first; tile < end; ++tile) values.add(tile, tile >= fp4_from);
    first = end;
    flash_mla::sm90::wait(smem.rows_done[i], phase);
    store(p, smem, values, member, i, wg);
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ GpuParams p) {
  using C = Config<Cfg>;
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw_smem);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t team = static_cast<int32_t>(blockIdx.x) / p.grid.team;
  const int32_t member = static_cast<int32_t>(blockIdx.x) % p.grid.team;

  if (thread == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      flash_mla::sm90::init(smem.kv_full[s], TokenLoader<Cfg>::kArrivals);
      flash_mla::sm90::init(smem.kv_empty[s], kWarpgroupWarps + kValueWarps);
    }
    for (int i = 0; i < 2; ++i) {
      flash_mla::sm90::init(smem.p_full[i], kWarpgroupWarps);
      flash_mla::sm90::init(smem.p_empty[i], kValueWarps);
      flash_mla::sm90::init(smem.item_full[i], 1);
      flash_mla::sm90::init(smem.rows_done[i], kWarpgroupWarps);
      flash_mla::sm90::init(smem.item_empty[i], kThreads / kLanes);
    }
    flash_mla::sm90::fence_barrier_init();
    smem.num_split = 0;
  }
  // In the tokens' place: the plan is made before the first item.
  const auto& runs =
      flash_mla::sm90::measure_after_predecessor<kThreads>(p.grid, RequestBlocks{p}, smem.tokens);

  const int warpgroup = uniform(thread / kWarpgroup);
  if (warpgroup == kValueGroups + 1) {
    flash_mla::sm90::give_registers<C::kLoadRegisters>();
    load_role(p, smem, runs, team, member);
  } else if (warpgroup == kValueGroups) {
    if constexpr (C::kKeyRegisters > 128) {
      flash_mla::sm90::take_registers<C::kKeyRegisters>();
    } else if constexpr (C::kKeyRegisters < 128) {
      flash_mla::sm90::give_registers<C::kKeyRegisters>();
    }
    keys_role(p, smem, member);
  } else {
    flash_mla::sm90::take_registers<C::kValueRegisters>();
    values_role(p, smem, warpgroup, member);
    // All tokens have been read: their stages are free for the merge.
    flash_mla::sm90::named_barrier_sync(kValuesSync, kValueThreads);
    merge_split_units<Op, DType::kBFloat16, PartColumns::kInOrder, kValueThreads>(
        p, smem.split_items, smem.num_split, member, kValueWarps, thread, smem.tokens,
        smem.outcomes, [] { flash_mla::sm90::named_barrier_sync(kValuesSync, kValueThreads); });
  }
}

}  // namespace flash_mla::mla_decode_sparse::sm90
