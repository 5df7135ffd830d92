// Token-sparse MLA decode on Hopper, packed float8 caches.
//
//   out[r] = sink_factor * sum_j softmax_j(scale q[r].k[j]) k[j][0:512]
//                   for the 16, 32 or 64 heads r of an M tile, and the tokens j that a query names
//
// Tile: these rows x 64 tokens. Tokens come into shared memory as they are in the cache, a row at a
// time. The products are transposed, so that codes are converted to fp16 in the registers that the
// products read, once as K and once as V.
//
//   warps  registers  role
//   0-3    168        values: P V of all tiles, columns 0-255 of O; tokens by the copy engine
//   4-7    168        values: columns 256-511; tokens; the CTA's items (warp 7)
//   8-11   88         keys: queries; Q K^T and softmax of even tiles
//   12-15  88         keys: of odd tiles
//
// Shared memory: Q 16 to 72 KB, P 4 to 16 KB, three or four stages of tokens, 34 to 42 KB each.
//
//   barrier        arrivals                              phase
//   kv_full[s]     8 warps of values + bytes             fill of stage s
//   kv_empty[s]    4 warps of keys, 8 of values          fill of stage s
//   max_full[k]    4 warps of keys k: maxima known       tile of keys k
//   p_full[k]      4 warps of keys k: P written          tile of keys k
//   p_empty[k]     8 warps of values                     tile of keys k
//   item_full[i]   1: the item is in slot i              item of slot i
//   sums_full[i]   8 warps of keys                       item of slot i
//   item_empty[i]  16 warps are done with the item       item of slot i
#pragma once

#include "mla_decode_sparse/sm90/keys.cuh"
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
  slot.main_blocks = ceil_div(slot.num_tokens[0], kBlockKeys);
  const TileRows rows(p, item, member);
  slot.entries[0] = p.main.indices + rows.request * p.main.indices_stride_b +
                    rows.token * p.main.indices_stride_s;
  slot.entries[1] = p.extra.indices + rows.request * p.extra.indices_stride_b +
                    rows.token * p.extra.indices_stride_s;
  slot.fp4 = p.extra.kv.format == KvFormat::kV41Fp4;
}

template <class Cfg>
__device__ __forceinline__ void keys_role(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                          int32_t member) {
  using C = Config<Cfg>;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kRoleThreads;
  Keys<Cfg> keys(smem, wg);
  uint32_t first = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const uint32_t i = index % 2;
    const volatile ItemSlot& slot = smem.slots[i];
    flash_mla::sm90::wait(smem.item_full[i], index / 2 % 2);
    if (uniform(slot.item.request) < 0) break;
    const int32_t tiles = uniform(slot.num_tiles);
    // All have multiplied the last item's queries.
    flash_mla::sm90::named_barrier_sync(kKeysSync, kRoleThreads);
    const int32_t row = thread / 4;
    if (row < C::kRows) {
      WorkItem item;
      item.request = slot.item.request;
      item.unit = slot.item.unit;
      const TileRows rows(p, item, member);
      const float factor = flash_mla::sm90::load_query_row<C::kQueryBlocks, false, /*kAtOnce=*/5>(
          rows.valid(p, row) ? reinterpret_cast<const uint8_t*>(rows.query(p, row)) : nullptr,
          smem.q, C::kQueryBlockBytes, row, thread % 4, p.softmax_scale * kLog2e);
      if (thread % 4 == 0) smem.rows[row] = {kNoMaximum, factor};
    }
    flash_mla::sm90::fence_async_proxy();
    flash_mla::sm90::named_barrier_sync(kKeysSync, kRoleThreads);
    keys.attend(i, first, tiles);
    first += tiles;
  }
}

// The last warp plans items too, each while the tiles of the one before are attended.
template <class Cfg>
__device__ __forceinline__ void values_role(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                            const RequestRuns<kThreads>& runs, int32_t team,
                                            int32_t member) {
  using C = Config<Cfg>;
  const bool plans = threadIdx.x >= kRoleThreads - kLanes;
  const auto plan_item = [&](uint32_t index) {
    if (plans && threadIdx.x % kLanes == 0) {
      flash_mla::sm90::wait(smem.item_empty[index % 2], (index / 2 & 1) ^ 1);
      next_slot(p, smem.plan, team, member, smem.slots[index % 2]);
      flash_mla::sm90::arrive(smem.item_full[index % 2]);
    }
    __syncwarp();
  };
  if (plans) make_plan(p.grid, team, RequestBlocks{p}, runs, smem.plan);
  plan_item(0);
  Values<Cfg> values(smem, wg);
  TokenLoader<Cfg> loader(p, smem);
  uint32_t first = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const uint32_t i = index % 2, phase = index / 2 % 2;
    flash_mla::sm90::wait(smem.item_full[i], phase);
    if (uniform(smem.slots[i].item.request) < 0) break;
    const int32_t tiles = uniform(smem.slots[i].num_tiles);
    // Before the next item takes the place of the one before, which the loader may still be at.
    loader.catch_up(index);
    if (index == 0) loader.fill(min(tiles, C::kStages), 0);
    plan_item(index + 1);
    values.clear();
    const int32_t fp4_from =
        C::kFp4Extra && smem.slots[i].fp4
            ? uniform(smem.slots[i].main_blocks - smem.slots[i].item.block_begin)
            : tiles;
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; ++tile) {
      loader.fill(first + tile + C::kStages, index);  // up to the stage of the tile before
      values.add(first + tile, tile >= fp4_from);
    }
    first += tiles;
    flash_mla::sm90::wait(smem.sums_full[i], phase);
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
      // With scales at the page's end, each token's own copy arrives too.
      flash_mla::sm90::init(smem.kv_full[s], kRoleWarps + (C::kPageScales ? kTileKeys : 0));
      flash_mla::sm90::init(smem.kv_empty[s], kWarpgroupWarps + kRoleWarps);
    }
    for (int i = 0; i < 2; ++i) {
      flash_mla::sm90::init(smem.max_full[i], kWarpgroupWarps);
      flash_mla::sm90::init(smem.p_full[i], kWarpgroupWarps);
      flash_mla::sm90::init(smem.p_empty[i], kRoleWarps);
      flash_mla::sm90::init(smem.item_full[i], 1);
      flash_mla::sm90::init(smem.sums_full[i], kRoleWarps);
      flash_mla::sm90::init(smem.item_empty[i], 2 * kRoleWarps);
    }
    flash_mla::sm90::fence_barrier_init();
    smem.num_split = 0;
  }
  // In the tokens' place: the plan is made before the first item.
  const auto& runs =
      flash_mla::sm90::measure_after_predecessor<kThreads>(p.grid, RequestBlocks{p}, smem.tokens);

  const int warpgroup = uniform(thread / kWarpgroup);
  if (warpgroup >= kGroups) {
    flash_mla::sm90::give_registers<kKeyRegisters>();
    keys_role(p, smem, warpgroup - kGroups, member);
  } else {
    flash_mla::sm90::take_registers<kValueRegisters>();
    values_role(p, smem, warpgroup, runs, team, member);
    // All tokens have been read: their stages are free for the merge.
    flash_mla::sm90::named_barrier_sync(kValuesSync, kRoleThreads);
    merge_split_units<Op, DType::kBFloat16, PartColumns::kInOrder, kRoleThreads>(
        p, smem.split_items, smem.num_split, member, kRoleWarps, thread, smem.tokens, smem.outcomes,
        [] { flash_mla::sm90::named_barrier_sync(kValuesSync, kRoleThreads); });
  }
}

}  // namespace flash_mla::mla_decode_sparse::sm90
