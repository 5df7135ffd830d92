// Dense MLA decode for every NVIDIA GPU since sm_80, with mma.sync and cp.async.
//
//   out[r] = descale_k * sum_j softmax_j(scale q[r].k[j]) k[j][0:512]   for the rows r of an M tile
//
// Tile: M = 16 or 32 query rows x N = 32 keys x K = 576 or 512 columns. A CTA walks the keys of its
// items (device/decode_schedule.h; one CTA a team), with Q and O in registers and K in a ring of 2
// to 4 stages, loaded across the boundaries of items.
//
//   warps                    registers  role
//   4 a group of 16 rows     <= 255     all: load.cuh copies the slab's columns of K, attend.cuh
//                                       multiplies them with Q and P, store.cuh writes O's
//
// Warp s of a group has slab s: columns [128 s, 128 s + 128) of K, V and O, 16 of the RoPE columns,
// and, in v32_fp8, the one scale that these 128 columns of a token share. It computes its part of
// the logits, S_s = Q_s K_s^T (36 mma for 32 keys), exchanges it with the other slabs' through
// shared memory, and does the softmax of all 16 rows, as they do: P is in registers as the A
// operand of O_s += P V_s (32 mma). The same warp loads what it multiplies, so with M = 16 a stage
// needs no barrier at all, and a tile the one between the parts of the logits. M = 32 puts two
// warps on a slab: each loads half of the keys and both wait at a barrier of the CTA.
//
// e4m3 codes become bf16 between ldmatrix and mma, once for Q K^T and once for P V: 2.25
// instructions a value. K's scales are applied to S_s and V's to P, never to values: codes are
// exact in bf16. The order of columns within 4 neighbours that this gives is undone in Q and O.
//
// Shared memory, at most 99 KB (config.h, smem.h):
//                      bf16, fp16 576 / 512   fp8 576, 512   v32_fp8
//   a token of a slab  19 / 17 x 16 bytes     9 x 16         11 x 16    odd: no bank conflicts
//   stages of 32 keys  2 x 38.0 / 34.0 KB     4 x 18.0 KB    3 x 22.0 KB
//   parts of logits    16 KB: two buffers for M = 16, one each for the two groups of M = 32
//   the rest           1 KB
//
//   barrier          who                   when
//   __syncthreads()  all                   an item begins; M = 16: the parts of a tile's logits are
//                                          there; M = 32: a stage has landed, the last one is free
//   kGroupBarrier+g  the 4 warps of group  M = 32: the parts of a tile's logits are there
//   __syncwarp()     a warp                M = 16: a stage has landed, the last one is free
//
// Bottleneck (a model, not measured): device memory up to 16 rows of a request, if a tile takes
// less than 4850 cycles at two CTAs an SM of an H200 (15 bytes a cycle and SM are 3.5 TB/s); the
// warp schedulers see about 520 instructions a tile and warp, 1050 with e4m3. One stage at least is
// under way all the time: 36 KB a CTA. With more rows, L2: each tile of rows reads all keys, so 32
// rows rather than 16 halve that, and on devices with room for one CTA an SM they double the warps.
// 64 rows were not built: Q would have to be in shared memory, the traffic there (2650 cycles for
// 32 keys, against 1710 of mma) would be the limit, and only sm_90 and sm_100 have room for it.
#pragma once

#include <cstdint>

#include "device/sm80/cp_async.cuh"
#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/portable/attend.cuh"
#include "mla_decode_dense/portable/load.cuh"
#include "mla_decode_dense/portable/smem.h"
#include "mla_decode_dense/portable/store.cuh"

namespace flash_mla::mla_decode_dense::portable {

template <class Cfg>
__global__ void __launch_bounds__(Config<Cfg>::kThreads, Config<Cfg>::kCtasPerSm)
    decode_kernel(const __grid_constant__ GpuParams p) {
  using C = Config<Cfg>;
  using flash_mla::sm80::wait_copies;
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(smem_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t team = static_cast<int32_t>(blockIdx.x);

  const RequestBlocks num_blocks{p};
  using Runs = RequestRuns<C::kThreads>;
  static_assert(sizeof(Runs) <= sizeof(smem.slabs));
  Runs& runs = reinterpret_cast<Runs&>(smem.slabs);
  measure_requests(p.grid, num_blocks, runs);
  __syncthreads();
  if (thread < kLanes) {
    make_plan(p.grid, team, num_blocks, runs, smem.plan);
  }

  Loader<Cfg> loader(p, smem);
  Attend<Cfg> attend(smem);
  // Of the CTA's items, number `turn` is attended and turn + 1 is known.
  int turn = -1;
  int next_load = 0;  // item that the loader takes up next
  int stage = 0;      // of the next tile to attend
  int num_ahead = 0;  // tiles from there on that are under way

  // Fills the free stages, with tiles of the next item once those of this one are under way.
  const auto load_ahead = [&] {
    while (num_ahead < C::kStages) {
      if (!loader.done()) {
        const int to = stage + num_ahead;
        loader.issue(to < C::kStages ? to : to - C::kStages);
        ++num_ahead;
      } else if (next_load <= turn + 1 && smem.item(next_load).valid()) {
        loader.start(smem.item(next_load));
        ++next_load;
      } else {
        break;
      }
    }
  };
  // Waits for the oldest tile under way: exactly when all stages are, else (at the end) for all.
  const auto wait_for_tile = [&] {
    if (num_ahead == C::kStages) {
      wait_copies<C::kStages - 1>();
    } else {
      wait_copies<0>();
    }
  };

  if (thread == 0) smem.num_split_items = 0;
  for (;; ++turn) {
    if (thread == 0 && (turn < 0 || smem.item(turn).valid())) {
      smem.item(turn + 1) = next_item(p.grid, team, smem.plan, p.list, p.num_listed, num_blocks);
    }
    if (turn < 0) continue;
    __syncthreads();
    const WorkItem& item = smem.item(turn);
    if (!item.valid()) break;
    if (next_load < turn) next_load = turn;  // items without a tile need not be loaded

#pragma unroll 1
    for (int32_t tiles = attend.start(p, item); tiles > 0; --tiles) {
      if constexpr (C::kGroups == 1) {
        // A slab is one warp's own.
        __syncwarp();  // all lanes have done with the stage that is filled now
        load_ahead();
        wait_for_tile();
        __syncwarp();  // the copies of all lanes
      } else {
        bool landed;
        do {
          landed = num_ahead > 0;
          if (landed) wait_for_tile();
          __syncthreads();  // the copies of all warps, and all have done with the last stage
          load_ahead();
        } while (!landed);
      }
      attend.tile(stage);
      stage = stage + 1 < C::kStages ? stage + 1 : 0;
      --num_ahead;
    }
    attend.finish();
    store_item(p, item, attend);
    if (item.num_parts > 1 && p.grid.invariant_splits == 0) {
      split_unit(p, item, /*member=*/0, C::kWarps).arrive();
      if (thread == 0) smem.split_items[smem.num_split_items++] = item;
    }
  }

  // The last turn's barrier: all tiles are attended, and the stages free for merging.
  merge_split_units<C::kType, PartColumns::kInOrder, C::kThreads>(
      p, smem.split_items, smem.num_split_items, /*member=*/0, C::kWarps, thread, smem.slabs,
      smem.outcomes, [] { __syncthreads(); });
}

}  // namespace flash_mla::mla_decode_dense::portable
