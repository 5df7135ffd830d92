// What the GPU rows of the decode operators share: the parts of a launch, the kernels around the
// main one in batch-invariant launches, and the end of a CTA that has made parts. An operator says
// with a type Op what Params its kernels take (its own, and DecodeLaunch), how many blocks a
// request has (Blocks), and where the merged rows of an item go (Output, see split_reduce.cuh).
#pragma once

#include "device/decode_schedule.cuh"
#include "device/sm90/programmatic_launch.cuh"
#include "device/split_reduce.cuh"
#include "runtime/launch.h"

namespace flash_mla {

// How a launch lays a problem over CTAs, and its workspace.
struct DecodeLaunch {
  DecodeGrid grid;
  PartialTiles partials;
  Meeting* meetings;
  ListedPart* list;  // of batch-invariant launches
  int32_t num_listed;
};

namespace sm90 {

// Where independent work of a CTA ends: lengths of the requests, for the plan, in shared memory
// that is free until the plan is made. By all threads.
template <int kThreads, class NumBlocks, class Place>
__device__ __forceinline__ RequestRuns<kThreads>& measure_after_predecessor(
    const DecodeGrid& grid, const NumBlocks& num_blocks, Place& place) {
  using Runs = RequestRuns<kThreads>;
  static_assert(sizeof(Runs) <= sizeof(place));
  launch_successor();
  wait_for_predecessor();
  auto& runs = reinterpret_cast<Runs&>(place);
  measure_requests(grid, num_blocks, runs);
  __syncthreads();
  return runs;
}

}  // namespace sm90

// `writers`: warps of a CTA that write a part.
__device__ __forceinline__ SplitUnit split_unit(const DecodeLaunch& p, const WorkItem& item,
                                                int32_t member, int32_t writers) {
  return {p.meetings,     item.first_team * p.grid.team + member,
          p.grid.team,    item.part,
          item.num_parts, writers};
}

// The first kernel of batch-invariant launches.
inline constexpr int kListThreads = 1024;
template <class Op, bool kProgrammatic>
__global__ void __launch_bounds__(kListThreads) list_fixed_parts_kernel(typename Op::Params p) {
  __shared__ int32_t keys[kListThreads], counts[kListThreads];
  if constexpr (kProgrammatic) {
    sm90::launch_successor();
    sm90::wait_for_predecessor();
  }
  list_fixed_parts<kListThreads>(p.grid, typename Op::Blocks{p}, keys, counts, p.list,
                                 p.num_listed);
}

// The last kernel of batch-invariant launches: merges every unit's fixed parts. blockIdx.x is the
// tile (unit, member), blockIdx.y the share of its rows.
inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeShares = 8;
template <class Op, DType kOut, PartColumns kColumns, bool kProgrammatic>
__global__ void __launch_bounds__(kMergeThreads) merge_fixed_splits_kernel(typename Op::Params p) {
  extern __shared__ float4 smem[];
  const int64_t unit = blockIdx.x / p.grid.team;
  const int32_t request = static_cast<int32_t>(unit / p.grid.units_per_request);
  const int32_t member = static_cast<int32_t>(blockIdx.x) % p.grid.team;
  if constexpr (kProgrammatic) sm90::wait_for_predecessor();
  const WorkItem item =
      fixed_item(p.grid, request, static_cast<int32_t>(unit % p.grid.units_per_request), 0,
                 typename Op::Blocks{p}(request));
  if (item.num_parts == 1) return;  // its only part went straight to the outputs
  const int thread = static_cast<int>(threadIdx.x);
  const auto tiles = PartTiles::of</*kFixed=*/true>(p.partials, p.grid, item, member);
  MergeThread own(tiles, blockIdx.y, kMergeShares, thread, kMergeThreads);
  own.load_header();
  merge<kOut, kColumns, kMergeThreads>(
      tiles, own, thread, smem, typename Op::Output{p, item, member}, [] { __syncthreads(); });
}

// After a CTA's last item: meets the other CTAs of its (at most two) split units and merges its
// shares. Called by kThreads threads, whose number `thread` is; barrier() synchronises them.
// `outcomes`: in shared memory, for each unit.
template <class Op, DType kOut, PartColumns kColumns, int kThreads, class Barrier>
__device__ __forceinline__ void merge_split_units(const typename Op::Params& p,
                                                  const WorkItem* split_items, int32_t num_items,
                                                  int32_t member, int32_t writers, int thread,
                                                  void* smem, uint32_t* outcomes,
                                                  const Barrier& barrier) {
  // One thread meets the others: the last, which has least to do where little is merged. Asked
  // anew each time, so that no predicate is kept.
  const auto speaks = [&] {
    int32_t number = thread;
    sm80::pin(number);
    return number == kThreads - 1;
  };
#pragma unroll 1
  for (int32_t i = 0; i < num_items; ++i) {
    const WorkItem item = split_items[i];
    const SplitUnit unit = split_unit(p, item, member, writers);
    const auto tiles = PartTiles::of</*kFixed=*/false>(p.partials, p.grid, item, member);
    // Before the barrier, which leaves time for it.
    MergeThread own(tiles, item.part, item.num_parts, thread, kThreads);
    sm80::pin(own.data_at);
    sm80::pin(own.header_at);
    if (speaks()) outcomes[i] = unit.wait();
    barrier();
    own.load_header();  // first of all: what is loaded next waits for it
    const uint32_t outcome = outcomes[i];
    const bool inherits = outcome == SplitUnit::kInherits;
    uint32_t left_before = 0;  // comes while the merge is under way
    if (speaks() && !inherits) left_before = unit.leave();
    bool takes = outcome != SplitUnit::kIncomplete;
#pragma unroll 1
    for (int32_t other = 0;; ++other) {
      // Where results go is worked out while the loads are under way, not before.
      WorkItem here = item;
      sm80::pin(here.request);
      sm80::pin(here.unit);
      if (takes) {
        merge<kOut, kColumns, kThreads>(tiles, own, thread, smem,
                                        typename Op::Output{p, here, member}, barrier);
      }
      if (!inherits || other == item.num_parts) break;
      barrier();
      if (speaks()) outcomes[i] = other != item.part && unit.has_given_up(other);
      barrier();
      takes = outcomes[i] != 0;
      own = MergeThread(tiles, other, item.num_parts, thread, kThreads);
      own.load_header();
    }
    if (speaks()) unit.clean_up(inherits ? unit.leave() : left_before);
  }
}

// ---- host ---------------------------------------------------------------------------------------

inline int64_t num_listed(const DecodeGrid& g) {
  return int64_t{g.num_units()} * g.invariant_splits;
}

inline int64_t list_bytes(const DecodeGrid& g) {
  return g.invariant_splits == 0 ? 0 : (num_listed(g) + 1) * int64_t{sizeof(ListedPart)};
}

// Scratch holds the partial tiles, then the list.
inline WorkspaceSize decode_workspace(const DecodeGrid& g) {
  return {num_partial_tiles(g) * PartialTiles::tile_bytes(g.tiles.rows()) + list_bytes(g),
          g.invariant_splits == 0 ? g.num_ctas() * int64_t{sizeof(Meeting)} : 0};
}

inline DecodeLaunch decode_launch(const DecodeGrid& g, const Workspace& workspace) {
  auto* const scratch = static_cast<uint8_t*>(workspace.scratch);
  const int64_t partial_bytes = num_partial_tiles(g) * PartialTiles::tile_bytes(g.tiles.rows());
  return {.grid = g,
          .partials = {scratch, g.tiles.rows()},
          .meetings = static_cast<Meeting*>(workspace.sync),
          .list = reinterpret_cast<ListedPart*>(scratch + partial_bytes),
          .num_listed = static_cast<int32_t>(num_listed(g))};
}

// The launch that comes before the kernel in batch-invariant calls.
template <class Op, bool kProgrammatic>
Status launch_list_fixed_parts(const typename Op::Params& p, Stream stream) {
  if (p.grid.invariant_splits == 0) return {};
  const LaunchShape shape = {
      .grid = dim3(1), .block = dim3(kListThreads), .programmatic = kProgrammatic};
  return launch_kernel(list_fixed_parts_kernel<Op, kProgrammatic>, shape, stream, Op::kName, p);
}

// The launch that ends batch-invariant calls.
template <class Op, DType kOut, PartColumns kColumns, bool kProgrammatic>
Status launch_merge_fixed_splits(const typename Op::Params& p, Stream stream) {
  if (p.grid.invariant_splits <= 1) return {};
  const LaunchShape shape = {
      .grid = dim3(static_cast<uint32_t>(p.grid.num_units() * p.grid.team), kMergeShares),
      .block = dim3(kMergeThreads),
      .smem_bytes = static_cast<size_t>(merge_smem_bytes(kMergeThreads, p.grid.tiles.rows())),
      .programmatic = kProgrammatic};
  return launch_kernel(merge_fixed_splits_kernel<Op, kOut, kColumns, kProgrammatic>, shape, stream,
                       Op::kName, p);
}

}  // namespace flash_mla
