// MLA decode for every NVIDIA GPU since sm_80, with mma.sync and cp.async: what the operators'
// portable kernels share.
//
// Tile: M = 16 or 32 query rows x N = 32 keys x K = 576 or 512 columns. A CTA walks the keys of its
// items (device/decode_schedule.h; one CTA a team), with Q and O in registers and K in a ring of
// stages, loaded across the boundaries of items.
//
//   warps                    registers  role
//   4 a group of 16 rows     <= 255     all: the operator's Loader copies the slab's columns of K,
//                                       attend.cuh multiplies them with Q and P, store.cuh writes
//                                       O's
//
// Warp s of a group has slab s: columns [128 s, 128 s + 128) of K, V and O, 16 of the RoPE columns
// behind column 512, and, in v32_fp8, the one scale that these 128 columns of a token share. It
// computes its part of the logits, S_s = Q_s K_s^T (36 mma for 32 keys), exchanges it with the
// other slabs' through shared memory, and does the softmax of all 16 rows, as they do: P is in
// registers as the A operand of O_s += P V_s (32 mma). The same warp loads what it multiplies, so
// with M = 16 a stage needs no barrier at all, and a tile the one between the parts of the logits.
// M = 32 puts two warps on a slab: each loads half of the keys and both wait at a barrier of the
// CTA.
//
// Tiles of e4m3 codes: these become bf16 between ldmatrix and mma, once for Q K^T and once for P V:
// 2.25 instructions a value. K's scales are applied to S_s and V's to P, never to values: codes are
// exact in bf16. The order of columns within 4 neighbours that this gives is undone in Q and O.
//
// Other packed formats have several scales in a slab: a stage holds the cache's bytes, from which a
// warp makes what it loaded a bf16 tile, the only one, before the warps attend it. The stage is
// free again then, and is filled while they do.
//
//   barrier          who                   when
//   __syncthreads()  all                   an item begins; M = 16: the parts of a tile's logits are
//                                          there; M = 32: a tile is there, the last one is free
//   kGroupBarrier+g  the 4 warps of group  M = 32: the parts of a tile's logits are there
//   __syncwarp()     a warp                M = 16: a tile is there, the last one is free
#pragma once

#include <cstdint>

#include "device/decode_launch.cuh"
#include "device/portable/attend.cuh"
#include "device/portable/smem.h"
#include "device/portable/store.cuh"
#include "device/sm80/cp_async.cuh"

namespace flash_mla::portable {

// What D says of the operator:
//
//   Op                      device/decode_launch.cuh
//   Params                  Op::Params
//   Config, SharedStorage   config.h; smem.h, or a type that adds to it what the Loader needs
//   Rows, rows(p, item)     the query rows of the CTA's tile: valid(), out(), lse()
//   query(p, rows, row)     the first byte of a row's query
//   logit_scale_log2(p, request)
//   item_factor(p, request), row_factor(p, rows, row, softmax)    of results
//   ItemKeys                (p, item, rows): where an item's keys begin, num_tiles()
//   Mask                    which of its keys the rows of a lane attend; kRowsDiffer: not all alike
//   Loader                  start(item), done(), issue(stage): a group of copies of each thread;
//                           kPrepares: prepare(stage) makes a tile of what its warp has loaded
template <class D>
__global__ void __launch_bounds__(D::Config::kThreads, D::Config::kCtasPerSm)
    decode_kernel(const __grid_constant__ typename D::Params p) {
  using C = typename D::Config;
  using Loader = typename D::Loader;
  using flash_mla::sm80::wait_copies;
  extern __shared__ __align__(128) uint8_t smem_bytes[];
  auto& smem = *reinterpret_cast<typename D::SharedStorage*>(smem_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t team = static_cast<int32_t>(blockIdx.x);

  const typename D::Op::Blocks num_blocks{p};
  using Runs = RequestRuns<C::kThreads>;
  static_assert(sizeof(Runs) <= sizeof(smem.slabs));
  Runs& runs = reinterpret_cast<Runs&>(smem.slabs);
  measure_requests(p.grid, num_blocks, runs);
  __syncthreads();
  if (thread < kLanes) {
    make_plan(p.grid, team, num_blocks, runs, smem.plan);
  }

  Loader loader(p, smem);
  Attend<D> attend(smem);
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
  const auto free_stage = [&] {
    stage = stage + 1 < C::kStages ? stage + 1 : 0;
    --num_ahead;
  };
  // A slab is one warp's own, or belongs to one of each group.
  const auto sync_slabs = [] {
    if constexpr (C::kGroups == 1) {
      __syncwarp();
    } else {
      __syncthreads();
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
      if constexpr (C::kConverts) {
        bool converted;
        do {
          converted = num_ahead > 0;
          if (converted) {
            sync_slabs();  // all have done with the tile
            wait_for_tile();
            __syncwarp();  // the copies of all lanes
            loader.prepare(stage);
            free_stage();
          }
          sync_slabs();  // the tile is there, and what the warp has of the stage is free
          load_ahead();
        } while (!converted);
        attend.attend(/*tile=*/0);
        continue;
      } else if constexpr (C::kGroups == 1) {
        sync_slabs();  // all lanes have done with the stage that is filled now
        load_ahead();
        wait_for_tile();
        sync_slabs();  // the copies of all lanes
        if constexpr (Loader::kPrepares) {
          loader.prepare(stage);
          sync_slabs();
        }
      } else {
        bool landed;
        do {
          landed = num_ahead > 0;
          if (landed) {
            wait_for_tile();
            if constexpr (Loader::kPrepares) {
              __syncwarp();  // the copies of all lanes
              loader.prepare(stage);
            }
          }
          sync_slabs();  // the copies of all warps, and all have done with the last stage
          load_ahead();
        } while (!landed);
      }
      attend.attend(stage);
      free_stage();
    }
    attend.finish();
    store_item(p, item, attend);
    if (item.num_parts > 1 && p.grid.invariant_splits == 0) {
      split_unit(p, item, /*member=*/0, C::kWarps).arrive();
      if (thread == 0) smem.split_items[smem.num_split_items++] = item;
    }
  }

  // The last turn's barrier: all tiles are attended, and the stages free for merging.
  merge_split_units<typename D::Op, C::kType, PartColumns::kInOrder, C::kThreads>(
      p, smem.split_items, smem.num_split_items, /*member=*/0, C::kWarps, thread, smem.slabs,
      smem.outcomes, [] { __syncthreads(); });
}

}  // namespace flash_mla::portable
