// Making the plan of decode_schedule.h with all threads of a CTA, and walking it.
#pragma once

#include "device/decode_schedule.h"
#include "device/warp.cuh"

namespace flash_mla {

// What a CTA keeps of the plan, in shared memory.
struct PlanStorage {
  DecodePlan plan;
  DecodeCursor cursor;
};

// Blocks of the requests, in runs of consecutive ones, one run a thread; up to kThreads requests
// have a run each. In shared memory until the plan is made.
template <int kThreads>
struct RequestRuns {
  int32_t blocks[kThreads];  // of a run, in all
  int32_t max[kThreads];

  static __device__ __forceinline__ int32_t length(const DecodeGrid& g) {
    return g.num_requests <= kThreads ? 1 : ceil_div(g.num_requests, kThreads);
  }
};

// By all threads of the CTA; a barrier must follow.
template <int kThreads, class NumBlocks>
__device__ __forceinline__ void measure_requests(const DecodeGrid& g, const NumBlocks& num_blocks,
                                                 RequestRuns<kThreads>& runs) {
  const int32_t length = RequestRuns<kThreads>::length(g);
  const int32_t first = threadIdx.x * length;
  int32_t sum = 0, max = 0;
#pragma unroll 1
  for (int32_t r = first; r < min(first + length, g.num_requests); ++r) {
    const int32_t blocks = num_blocks(r);
    sum += blocks;
    max = max_of(max, blocks);
  }
  runs.blocks[threadIdx.x] = sum;
  runs.max[threadIdx.x] = max;
}

// The plan, and the team's place in it. By one warp, after measure_requests() and a barrier; the
// warp can call next_item() at once.
template <int kThreads, class NumBlocks>
__device__ __forceinline__ void make_plan(const DecodeGrid& g, int32_t team,
                                          const NumBlocks& num_blocks,
                                          const RequestRuns<kThreads>& runs, PlanStorage& storage) {
  static_assert(kThreads >= kMinPlanThreads);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
  if (lane == 0) storage.cursor = DecodeCursor{};  // nothing, for a team beyond all work
  if (g.invariant_splits > 0) {
    if (lane == 0) {
      storage.plan = {PlanMode::kListed, 1};
      storage.cursor.position = team;
    }
    __syncwarp();
    return;
  }
  const int32_t length = RequestRuns<kThreads>::length(g);
  const int32_t num_runs = min(g.num_requests, kThreads);
  WorkTotals totals;
#pragma unroll 1
  for (int32_t i = lane; i < num_runs; i += kLanes) {
    totals.blocks += runs.blocks[i];
    totals.max_blocks = max_of(totals.max_blocks, runs.max[i]);
  }
  totals.blocks = __reduce_add_sync(kAllLanes, totals.blocks);
  totals.max_blocks = __reduce_max_sync(kAllLanes, totals.max_blocks);
  const DecodePlan plan = choose_plan(g, totals, [&](int32_t share) {
    int32_t parts = 0;  // there are no more requests than teams: each is a run
#pragma unroll 1
    for (int32_t r = lane; r < g.num_requests; r += kLanes) {
      parts += parts_of(runs.blocks[r], share);
    }
    return __reduce_add_sync(kAllLanes, parts) * g.units_per_request;
  });
  // Runs, 32 at a time, until one holds the team's first element; the lane walks to it.
  const int32_t begin = plan_begin(plan, team);
  int32_t before = 0;
#pragma unroll 1
  for (int32_t i = lane; i - lane < num_runs && before <= begin; i += kLanes) {
    const int32_t requests = i < num_runs ? max(0, min(length, g.num_requests - i * length)) : 0;
    int32_t weight = requests;
    if (plan.mode != PlanMode::kWhole && requests > 0) {
      weight = length == 1 ? plan_weight(plan, runs.blocks[i])
                           : runs.blocks[i] + requests * kItemCostBlocks;
    }
    weight *= g.units_per_request;
    int32_t position = weight;
#pragma unroll 1
    for (int d = 1; d < kLanes; d *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, position, d);
      if (lane >= d) position += other;
    }
    const int32_t total = __shfl_sync(kAllLanes, position, kLanes - 1);
    position += before - weight;
    before += total;
    if (position <= begin && begin < position + weight) {
      int32_t r = i * length;
      while (true) {
        const int32_t blocks = length == 1 ? runs.blocks[i] : num_blocks(r);
        const int32_t w = plan_weight(plan, blocks);
        if (begin < position + w * g.units_per_request) {
          storage.cursor = DecodeCursor::at(plan, team, r, blocks, position, w);
          break;
        }
        position += w * g.units_per_request;
        ++r;
      }
    }
  }
  if (lane == 0) storage.plan = plan;
  __syncwarp();
}

// A part in the list of a batch-invariant launch.
struct ListedPart {
  int32_t request;
  int32_t unit;
  int32_t part;
  int32_t blocks;  // of the request
};

// Item `k` of a team comes from this place of the list, which begins with the longest parts: there
// and back, so that who gets the longest of one round gets the shortest of the next.
__device__ __forceinline__ int32_t dealt_place(int32_t num_teams, int32_t team, int32_t k) {
  return k * num_teams + (k % 2 == 0 ? team : num_teams - 1 - team);
}

// The team's next item; always the same thread calls it. `list`: num_listed places for parts, and
// one more whose `part` is how many there are.
template <class NumBlocks>
__device__ __forceinline__ WorkItem next_item(const DecodeGrid& g, int32_t team,
                                              PlanStorage& storage, const ListedPart* list,
                                              int32_t num_listed, const NumBlocks& num_blocks) {
  if (storage.plan.mode != PlanMode::kListed) {
    return storage.cursor.next(g, storage.plan, num_blocks);
  }
  const int32_t place = dealt_place(g.num_teams, team, storage.cursor.unit++);
  if (place >= list[num_listed].part) return {};
  const ListedPart entry = list[place];
  return fixed_item(g, entry.request, entry.unit, entry.part, entry.blocks);
}

// Writes the list: by one CTA of kThreads threads. Requests by falling length of their parts; with
// more than kThreads requests in the order they come.
template <int kThreads, class NumBlocks>
__device__ __forceinline__ void list_fixed_parts(const DecodeGrid& g, const NumBlocks& num_blocks,
                                                 int32_t (&keys)[kThreads],
                                                 int32_t (&counts)[kThreads], ListedPart* list,
                                                 int32_t num_listed) {
  const auto count_of = [&](int32_t blocks) {
    return g.fixed_splits(blocks) * g.units_per_request;
  };
  int32_t before = 0;  // places of earlier rounds
#pragma unroll 1
  for (int32_t base = 0; base < g.num_requests; base += kThreads) {
    const int32_t r = base + static_cast<int32_t>(threadIdx.x);
    const int32_t here = min(kThreads, g.num_requests - base);
    const int32_t blocks = r < g.num_requests ? num_blocks(r) : 0;
    keys[threadIdx.x] = ceil_div(blocks, g.fixed_splits(blocks));
    counts[threadIdx.x] = r < g.num_requests ? count_of(blocks) : 0;
    __syncthreads();
    int32_t place = before;
#pragma unroll 1
    for (int32_t other = 0; other < here; ++other) {
      before += counts[other];
      const bool earlier = keys[other] != keys[threadIdx.x]
                               ? keys[other] > keys[threadIdx.x]
                               : other < static_cast<int32_t>(threadIdx.x);
      if (earlier) place += counts[other];
    }
    for (int32_t i = 0; i < counts[threadIdx.x]; ++i) {
      const int32_t parts = g.fixed_splits(blocks);
      list[place + i] = {r, i / parts, i % parts, blocks};
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) list[num_listed] = {-1, 0, before, 0};
}

}  // namespace flash_mla
