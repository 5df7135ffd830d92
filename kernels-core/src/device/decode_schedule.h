// How the work of a decode operator is laid over the CTAs of a launch. The shapes fix the grid on
// the host; the lengths are known on the device alone, so each CTA makes the plan for itself, the
// same one, at each launch. Pure functions: decode_schedule.cuh runs them on the device.
//
// A unit is one request, one key head and one team's worth of M tiles; its keys are counted in
// blocks. A team is the CTAs that walk a unit's keys side by side, one M tile each, so that a block
// is fetched from memory once. A team gets units, or parts of units, as items.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/macros.h"
#include "device/scheduler.h"

namespace flash_mla {

inline constexpr int32_t kBlockKeys = 64;

// Division by what the host knows: a product's upper half. Exact while value * divisor < 2^32.
struct Divisor {
  uint32_t value = 1;
  uint32_t inverse = 0;  // ceil(2^32 / value); 0 stands for 2^32

  static FLASH_MLA_HD constexpr Divisor of(int64_t value) {
    return {static_cast<uint32_t>(value),
            static_cast<uint32_t>(((int64_t{1} << 32) + value - 1) / value)};
  }
  FLASH_MLA_HD constexpr int32_t divide(int32_t n) const {
    const auto u = static_cast<uint32_t>(n);
    return static_cast<int32_t>(inverse == 0 ? u : (uint64_t{u} * inverse) >> 32);
  }
  FLASH_MLA_HD constexpr int32_t remainder(int32_t n) const {
    return n - divide(n) * static_cast<int32_t>(value);
  }
};

// The query rows of a request and key head, cut into M tiles: heads_per_tile heads of
// tokens_per_tile query tokens each, in the order (token, head).
struct RowTiles {
  int32_t heads_per_tile = 1;
  int32_t tokens_per_tile = 1;
  int32_t head_tiles = 1;
  int32_t token_tiles = 1;
  Divisor by_heads = Divisor::of(1), by_head_tiles = Divisor::of(1);

  static FLASH_MLA_HD constexpr RowTiles of(int64_t s_q, int64_t group, int64_t tile_m) {
    RowTiles t;
    t.head_tiles = static_cast<int32_t>(ceil_div(group, tile_m));
    t.heads_per_tile = static_cast<int32_t>(ceil_div(group, t.head_tiles));
    t.tokens_per_tile = static_cast<int32_t>(max_of(1, min_of(s_q, tile_m / t.heads_per_tile)));
    t.token_tiles = static_cast<int32_t>(ceil_div(s_q, t.tokens_per_tile));
    t.by_heads = Divisor::of(t.heads_per_tile);
    t.by_head_tiles = Divisor::of(t.head_tiles);
    return t;
  }
  FLASH_MLA_HD constexpr int32_t rows() const { return heads_per_tile * tokens_per_tile; }
  FLASH_MLA_HD constexpr int32_t num_tiles() const { return head_tiles * token_tiles; }
  FLASH_MLA_HD constexpr int32_t first_head(int32_t tile) const {
    return by_head_tiles.remainder(tile) * heads_per_tile;
  }
  FLASH_MLA_HD constexpr int32_t first_token(int32_t tile) const {
    return by_head_tiles.divide(tile) * tokens_per_tile;
  }
};

// What a launch consists of, from shapes alone.
struct DecodeGrid {
  RowTiles tiles;
  int32_t num_requests = 0;
  int32_t team = 1;               // CTAs of a team
  int32_t passes = 1;             // teams' worths of M tiles in a request and key head
  int32_t units_per_request = 1;  // key heads x passes
  int32_t num_teams = 1;
  // What cutting costs, in blocks: every part on its own, and all of them together for each part,
  // since partial results of all CTAs share the bandwidth of L2.
  int32_t split_cost_blocks = 0;
  float part_cost_blocks = 0.0f;
  int32_t invariant_splits = 0;  // 0: free splits; else at most this many, from the length alone
  int32_t whole_units = 1;       // units for each team, when none is split
  int32_t unit_teams = 0;        // teams for each unit, 0 when there are more units
  bool countable = true;         // sums of blocks times teams stay below 2^32; else none is split
  Divisor by_passes = Divisor::of(1), by_units = Divisor::of(1), by_teams = Divisor::of(1);

  FLASH_MLA_HD constexpr int32_t num_ctas() const { return num_teams * team; }
  FLASH_MLA_HD constexpr int32_t num_units() const { return num_requests * units_per_request; }
  // Splits of a unit in batch-invariant mode.
  FLASH_MLA_HD constexpr int32_t fixed_splits(int32_t blocks) const {
    constexpr int32_t kSplitBlocks = kInvariantSplitKeys / kBlockKeys;
    const int32_t wanted = (blocks + kSplitBlocks - 1) / kSplitBlocks;
    return wanted < 1 ? 1 : wanted < invariant_splits ? wanted : invariant_splits;
  }
};

inline constexpr int32_t kMaxTeam = 4;

// Units of fewer blocks are not cut. Partial results are rounded to 16 bits, and where few keys are
// cut into few parts that is too much: what rounding adds falls with the number of keys.
inline constexpr int32_t kLeastSplitBlocks = 8;

// How many parts of at most `share` blocks a unit has.
FLASH_MLA_HD constexpr int32_t parts_of(int32_t blocks, int32_t share) {
  return blocks < kLeastSplitBlocks ? 1 : ceil_div(blocks, share);
}
// Threads of the smallest CTA that makes a plan: up to so many requests, it has each one's length.
inline constexpr int32_t kMinPlanThreads = 128;

// `ctas`: how many can be resident at once.
FLASH_MLA_HD constexpr DecodeGrid decode_grid(int64_t requests, int64_t s_q, int64_t group,
                                              int64_t h_kv, int64_t tile_m, int64_t max_team,
                                              int64_t ctas, int64_t max_blocks,
                                              bool batch_invariant) {
  DecodeGrid g;
  g.tiles = RowTiles::of(s_q, group, tile_m);
  g.num_requests = static_cast<int32_t>(requests);
  g.passes = static_cast<int32_t>(ceil_div(g.tiles.num_tiles(), max_team));
  g.team = static_cast<int32_t>(ceil_div(g.tiles.num_tiles(), g.passes));
  g.units_per_request = static_cast<int32_t>(h_kv * g.passes);
  // More teams than there are blocks, or units without keys, would find nothing to do.
  const int64_t most = requests * g.units_per_request * (max_blocks + 1);
  g.num_teams = static_cast<int32_t>(max_of(1, min_of(ctas / g.team, most)));
  g.countable = most * max_of(2, g.num_teams) < (int64_t{1} << 32);
  g.whole_units = static_cast<int32_t>(ceil_div(g.num_units(), g.num_teams));
  if (requests <= kMinPlanThreads) {
    g.unit_teams = static_cast<int32_t>(g.num_teams / max_of(1, g.num_units()));
  }
  g.by_passes = Divisor::of(g.passes);
  g.by_units = Divisor::of(g.units_per_request);
  g.by_teams = Divisor::of(g.num_teams);
  // A block of 64 rows takes 1.4 us. Writing 64 rows of partial results, 64 KB, and reading them
  // back takes 0.04 us at the L2 bandwidth of a whole H200; fence, counter and latencies about 4
  // us, and merging 64 rows, of however many parts, some 3.
  g.split_cost_blocks = 3 + g.tiles.rows() / 32;
  g.part_cost_blocks = 0.03f * static_cast<float>(g.team * g.tiles.rows()) / 64.0f;
  if (batch_invariant) {
    g.invariant_splits = static_cast<int32_t>(max_of(
        1, min_of(kInvariantSplits, ceil_div(max_blocks * kBlockKeys, kInvariantSplitKeys))));
  }
  return g;
}

// What loading a query tile and storing a result costs an item, in blocks.
inline constexpr int32_t kItemCostBlocks = 1;

// A team's piece of work: blocks [block_begin, block_end) of a unit, its part `part` of num_parts.
struct WorkItem {
  int32_t request = -1;  // negative: there is no more
  int32_t unit = 0;      // of the request: key head * passes + pass
  int32_t block_begin = 0;
  int32_t block_end = 0;
  int32_t part = 0;
  int32_t num_parts = 1;
  int32_t first_team = 0;  // the team that has part 0

  FLASH_MLA_HD constexpr bool valid() const { return request >= 0; }
};

enum class PlanMode : int32_t {
  kWhole,       // `share` units for each team
  kSplitUnits,  // fewer units than teams: a team has one part of at most `share` blocks
  kContiguous,  // a team has a range of cost `share` in the sequence of all units
  kListed,      // batch-invariant: the units' fixed parts, dealt from a list made in advance
};

struct DecodePlan {
  PlanMode mode = PlanMode::kWhole;
  int32_t share = 1;
};

struct WorkTotals {
  int32_t blocks = 0;  // of all requests, one unit each
  int32_t max_blocks = 0;
};

// The plan whose slowest team is done first. count_parts(share) is the number of parts, over all
// units, when each has at most `share` blocks; it is called only if there are teams to spare.
template <class CountParts>
FLASH_MLA_HD DecodePlan choose_plan(const DecodeGrid& g, const WorkTotals& totals,
                                    const CountParts& count_parts) {
  const int32_t units = g.num_units();
  DecodePlan best = {PlanMode::kWhole, g.whole_units};
  if (!g.countable) return best;
  int32_t best_cost = g.whole_units * (totals.max_blocks + kItemCostBlocks);

  const int32_t blocks = totals.blocks * g.units_per_request;
  if (g.unit_teams > 1) {
    int32_t low = max_of(1, g.by_teams.divide(blocks + g.num_teams - 1));
    int32_t high = max_of(1, totals.max_blocks);
    if (totals.blocks == totals.max_blocks * g.num_requests) {  // all of one length
      low = high = max_of(1, ceil_div(high, g.unit_teams));
    }
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (count_parts(middle) <= g.num_teams) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    // share + part_cost * blocks / share is least where
    const float least = sqrtf(g.part_cost_blocks * static_cast<float>(blocks));
    high = max_of(high, static_cast<int32_t>(least + 0.5f));
    const int32_t cost = high + kItemCostBlocks + g.split_cost_blocks;
    if (high < totals.max_blocks && totals.max_blocks >= kLeastSplitBlocks && cost < best_cost) {
      best = {PlanMode::kSplitUnits, high};
      best_cost = cost;
    }
  }
  const int32_t share =
      max_of(1, g.by_teams.divide(blocks + units * kItemCostBlocks + g.num_teams - 1));
  // A team's range can begin and end inside units.
  if (share + 2 * kItemCostBlocks + 2 * g.split_cost_blocks < best_cost) {
    best = {PlanMode::kContiguous, share};
  }
  return best;
}

// What a request of `blocks` blocks takes up in the plan's sequence, per unit: parts or cost.
FLASH_MLA_HD constexpr int32_t plan_weight(const DecodePlan& plan, int32_t blocks) {
  if (plan.mode == PlanMode::kWhole) return 1;
  if (plan.mode == PlanMode::kSplitUnits) return parts_of(blocks, plan.share);
  return blocks + kItemCostBlocks;
}

// Where a team's work begins in the plan's sequence.
FLASH_MLA_HD constexpr int32_t plan_begin(const DecodePlan& plan, int32_t team) {
  return plan.mode == PlanMode::kSplitUnits ? team : team * plan.share;
}

// The blocks of part `part` of num_parts, which differ by at most one between parts.
FLASH_MLA_HD constexpr void cut(int32_t blocks, WorkItem* item) {
  const int32_t each = blocks / item->num_parts, longer = blocks % item->num_parts;
  item->block_begin = each * item->part + min_of(item->part, longer);
  item->block_end = item->block_begin + each + (item->part < longer ? 1 : 0);
}

// Part `part` of a unit in batch-invariant mode.
FLASH_MLA_HD constexpr WorkItem fixed_item(const DecodeGrid& g, int32_t request, int32_t unit,
                                           int32_t part, int32_t blocks) {
  WorkItem item;
  item.request = request;
  item.unit = unit;
  item.part = part;
  item.num_parts = g.fixed_splits(blocks);
  cut(blocks, &item);
  return item;
}

// Walks the items of one team in modes other than kListed.
struct DecodeCursor {
  int32_t begin = 0;  // of the team's range in the plan's sequence
  int32_t end = 0;
  int32_t position = 0;  // of the current unit's first element in it
  int32_t request = 0;
  int32_t unit = 0;
  int32_t blocks = 0;  // of the request

  // `request_position`: of the request that holds plan_begin(plan, team).
  static FLASH_MLA_HD DecodeCursor at(const DecodePlan& plan, int32_t team, int32_t request,
                                      int32_t blocks, int32_t request_position, int32_t weight) {
    DecodeCursor c;
    c.begin = plan_begin(plan, team);
    c.end = plan.mode == PlanMode::kSplitUnits ? c.begin + 1 : c.begin + plan.share;
    c.request = request;
    c.blocks = blocks;
    c.unit = (c.begin - request_position) / weight;
    c.position = request_position + c.unit * weight;
    return c;
  }

  // num_blocks(request) gives the lengths of later requests.
  template <class NumBlocks>
  FLASH_MLA_HD WorkItem next(const DecodeGrid& g, const DecodePlan& plan,
                             const NumBlocks& num_blocks) {
    WorkItem item;
    while (position < end && request < g.num_requests) {
      const int32_t weight = plan_weight(plan, blocks);
      item.block_begin = 0;
      item.block_end = blocks;
      if (plan.mode == PlanMode::kSplitUnits) {
        item.part = begin - position;
        item.num_parts = weight;
        cut(blocks, &item);
        item.first_team = position;
      } else if (plan.mode == PlanMode::kContiguous) {
        // The cost of the item itself comes after its blocks.
        const int32_t last = position + max_of(1, blocks) - 1;
        item.first_team = position / plan.share;
        item.part = begin / plan.share - item.first_team;
        item.num_parts = last / plan.share - item.first_team + 1;
        item.block_begin = max_of(0, begin - position);
        item.block_end = min_of(blocks, end - position);
      }
      bool mine = item.block_begin < item.block_end;
      if (plan.mode == PlanMode::kContiguous && blocks < kLeastSplitBlocks) {
        // Whole, where it begins.
        mine = position >= begin;
        item = WorkItem{};
        item.block_end = blocks;
      } else if (blocks == 0) {
        mine = position >= begin;
      }
      item.request = mine ? request : -1;
      item.unit = unit;
      position += weight;
      if (++unit == g.units_per_request) {
        unit = 0;
        if (++request < g.num_requests && position < end) blocks = num_blocks(request);
      }
      if (mine) return item;
    }
    item.request = -1;
    return item;
  }
};

}  // namespace flash_mla
