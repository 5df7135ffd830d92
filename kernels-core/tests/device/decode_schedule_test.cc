#include "device/decode_schedule.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include "support.h"

using namespace flash_mla;

namespace {

using Lengths = std::vector<int32_t>;  // blocks of each request

// Numbers that look random and are the same in each run.
struct Dice {
  uint64_t state;

  // One of 0..n-1.
  int32_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(n));
  }
  template <size_t n>
  int32_t one_of(const int32_t (&values)[n]) {
    return values[below(n)];
  }
};

struct Shape {
  int32_t requests = 1, s_q = 1, group = 16, h_kv = 1;
  int32_t tile_m = 64, max_team = 4, ctas = 132;

  DecodeGrid grid(int64_t max_blocks, bool batch_invariant = false) const {
    return decode_grid(requests, s_q, group, h_kv, tile_m, max_team, ctas, max_blocks,
                       batch_invariant);
  }
};

int32_t longest(const Lengths& lengths) {
  return *std::max_element(lengths.begin(), lengths.end());
}

// ---- the plan, as a CTA makes it ----------------------------------------------------------------

DecodePlan plan_of(const DecodeGrid& g, const Lengths& lengths) {
  const WorkTotals totals = {std::accumulate(lengths.begin(), lengths.end(), 0), longest(lengths)};
  return choose_plan(g, totals, [&](int32_t share) {
    int32_t parts = 0;
    for (int32_t blocks : lengths) parts += parts_of(blocks, share);
    return parts * g.units_per_request;
  });
}

// Where the requests begin in the plan's sequence, and where the last one ends.
std::vector<int32_t> positions_of(const DecodeGrid& g, const DecodePlan& plan,
                                  const Lengths& lengths) {
  std::vector<int32_t> positions = {0};
  for (int32_t blocks : lengths) {
    positions.push_back(positions.back() + plan_weight(plan, blocks) * g.units_per_request);
  }
  return positions;
}

DecodeCursor cursor_of(const DecodePlan& plan, int32_t team, const Lengths& lengths,
                       const std::vector<int32_t>& positions) {
  const int32_t begin = plan_begin(plan, team);
  if (begin >= positions.back()) return {};
  const auto next = std::upper_bound(positions.begin(), positions.end(), begin);
  const int32_t r = static_cast<int32_t>(next - positions.begin()) - 1;
  return DecodeCursor::at(plan, team, r, lengths[r], positions[r], plan_weight(plan, lengths[r]));
}

struct Schedule {
  DecodePlan plan;
  std::vector<std::vector<WorkItem>> items;  // of each team
  bool ends = true;                          // every team's walk, and for good
};

Schedule schedule_of(const DecodeGrid& g, const Lengths& lengths) {
  Schedule s;
  s.plan = plan_of(g, lengths);
  s.items.resize(g.num_teams);
  const std::vector<int32_t> positions = positions_of(g, s.plan, lengths);
  const auto num_blocks = [&](int32_t request) { return lengths.at(request); };
  for (int32_t team = 0; team < g.num_teams; ++team) {
    DecodeCursor cursor = cursor_of(s.plan, team, lengths, positions);
    std::vector<WorkItem>& items = s.items[team];
    WorkItem item = cursor.next(g, s.plan, num_blocks);
    while (item.valid() && static_cast<int32_t>(items.size()) < g.num_units()) {
      items.push_back(item);
      item = cursor.next(g, s.plan, num_blocks);
    }
    s.ends = s.ends && !item.valid() && !cursor.next(g, s.plan, num_blocks).valid();
  }
  return s;
}

// Blocks and costs of the items of the team that is done last.
int32_t slowest_cost(const Schedule& s) {
  int32_t slowest = 0;
  for (const auto& items : s.items) {
    int32_t cost = 0;
    for (const WorkItem& item : items) cost += item.block_end - item.block_begin + kItemCostBlocks;
    slowest = max_of(slowest, cost);
  }
  return slowest;
}

bool splits_nothing(const Schedule& s) {
  for (const auto& items : s.items) {
    for (const WorkItem& item : items) {
      if (item.part != 0 || item.num_parts != 1) return false;
    }
  }
  return true;
}

// ---- what must hold for every batch -------------------------------------------------------------

// The rule that a schedule breaks, null if none.
const char* broken_rule(const DecodeGrid& g, const Lengths& lengths, const Schedule& s) {
  struct Unit {
    int32_t blocks = 0;  // that the parts so far have
    int32_t parts = 0;
    int32_t num_parts = 1;
    int32_t first_team = 0;
  };
  std::vector<Unit> units(g.num_units());
  if (!s.ends) return "a team's items end";
  for (int32_t team = 0; team < g.num_teams; ++team) {
    const std::vector<WorkItem>& items = s.items[team];
    int32_t team_blocks = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      const WorkItem& item = items[i];
      if (item.request >= g.num_requests || item.unit < 0 || item.unit >= g.units_per_request) {
        return "an item is a part of a unit that there is";
      }
      Unit& unit = units[item.request * g.units_per_request + item.unit];
      const int32_t blocks = lengths[item.request];
      if (unit.parts == 0) {
        unit.num_parts = item.num_parts;
        unit.first_team = item.first_team;
      }
      if (item.part != unit.parts) return "parts are numbered along the teams, from 0";
      if (item.num_parts != unit.num_parts) return "parts agree how many they are";
      if (item.num_parts > 1) {
        if (item.first_team != unit.first_team) return "parts agree where the first one is";
        if (team != item.first_team + item.part) return "parts are on consecutive teams";
      }
      if (item.block_begin != unit.blocks) return "parts follow each other without a gap";
      if (item.block_end <= item.block_begin && blocks > 0) return "a part has blocks";
      if (item.block_end > blocks) return "an item's blocks are the unit's";
      unit.blocks = item.block_end;
      ++unit.parts;
      team_blocks += item.block_end - item.block_begin;
      if (item.num_parts > 1 && lengths[item.request] < kLeastSplitBlocks) {
        return "a short unit is whole";
      }
      // So a CTA has two partial tiles at most.
      if (item.part > 0 && i != 0) return "only a team's first item continues a unit";
      if (item.part + 1 < item.num_parts && i + 1 != items.size()) {
        return "only a team's last item is continued by another team";
      }
    }
    if (s.plan.mode == PlanMode::kWhole) {
      if (static_cast<int32_t>(items.size()) > s.plan.share) return "a team has its share of units";
    } else if (team_blocks > s.plan.share + kLeastSplitBlocks - 1) {  // a short unit is whole
      return "a team has its share of blocks";
    }
  }
  for (int32_t u = 0; u < g.num_units(); ++u) {
    const int32_t blocks = lengths[u / g.units_per_request];
    if (blocks == 0 && units[u].parts != 1) return "a unit without blocks is one item";
    if (units[u].blocks != blocks) return "every block is covered";
    if (units[u].parts != units[u].num_parts) return "every part is there";
  }
  if (s.plan.mode == PlanMode::kWhole) {
    if (!splits_nothing(s)) return "whole units are not split";
  } else if (slowest_cost(s) >= g.whole_units * (longest(lengths) + kItemCostBlocks)) {
    return "units are split only if that gains something";
  }
  return nullptr;
}

// Lengths of one of kPatterns kinds.
constexpr int32_t kPatterns = 8;
Lengths make_lengths(int32_t pattern, int32_t requests, Dice& dice) {
  Lengths lengths(requests, 0);
  const int32_t typical = dice.one_of({1, 2, 5, 17, 64, 250, 2000});
  for (int32_t& blocks : lengths) {
    switch (pattern) {
      case 0: break;                    // no keys at all
      case 1: blocks = typical; break;  // all alike
      case 2: blocks = dice.below(typical + 1); break;
      case 3: blocks = dice.below(3) == 0 ? 0 : 1 + dice.below(typical); break;
      case 4: blocks = 1 + dice.below(4); break;  // short ones, and one very long one
      case 5: blocks = 0; break;                  // the same without any short ones
      case 6: blocks = typical + dice.below(2); break;
      case 7: blocks = dice.below(2) == 0 ? typical : 1; break;
    }
  }
  if (pattern == 4 || pattern == 5) {
    const int32_t place = dice.one_of({0, requests / 2, requests - 1});
    lengths[place] = dice.one_of({100, 1023, 4096, 30000});
  }
  return lengths;
}

}  // namespace

TEST(divisor_divides_as_the_operator_does) {
  Dice dice = {1};
  std::vector<int64_t> divisors = {4095,  4096,  4097,       65535,      65536,
                                   65537, 99991, 1000000007, 2147483646, 2147483647};
  for (int64_t d = 1; d <= 1100; ++d) divisors.push_back(d);
  for (int64_t d : divisors) {
    const Divisor by = Divisor::of(d);
    // The largest value whose product with the divisor is below 2^32.
    const int64_t most = min_of(int64_t{INT32_MAX}, ((int64_t{1} << 32) - 1) / d);
    std::vector<int64_t> values = {0, 1, d - 1, d, d + 1, 2 * d - 1, 2 * d, most - 1, most};
    for (int64_t multiple : {most / d * d, most / d / 2 * d, (most / d - 1) * d}) {
      values.insert(values.end(), {multiple - 1, multiple, multiple + d - 1});
    }
    for (int i = 0; i < 100; ++i) values.push_back(dice.below(most + 1));
    bool same = true;
    for (int64_t value : values) {
      if (value < 0 || value > most) continue;
      const int32_t n = static_cast<int32_t>(value);
      same = same && by.divide(n) == value / d && by.remainder(n) == value % d;
    }
    EXPECT(same);
  }
}

TEST(tiles_cover_every_token_and_head_once) {
  for (int32_t tile_m : {16, 32, 64}) {
    for (int32_t s_q : {1, 2, 3, 5, 64, 128}) {
      for (int32_t group = 1; group <= 129; ++group) {
        const RowTiles tiles = RowTiles::of(s_q, group, tile_m);
        std::vector<int> times(s_q * group, 0);
        bool fit = tiles.rows() <= tile_m;
        for (int32_t tile = 0; tile < tiles.num_tiles(); ++tile) {
          fit = fit && tiles.first_token(tile) < s_q && tiles.first_head(tile) < group;
          for (int32_t row = 0; row < tiles.rows(); ++row) {
            const int32_t token = tiles.first_token(tile) + tiles.by_heads.divide(row);
            const int32_t head = tiles.first_head(tile) + tiles.by_heads.remainder(row);
            if (token < s_q && head < group) ++times[token * group + head];
          }
        }
        EXPECT(fit);
        EXPECT(std::count(times.begin(), times.end(), 1) == s_q * group);
      }
    }
  }
}

TEST(a_request_has_a_unit_for_each_key_head_and_teams_worth_of_tiles) {
  for (int32_t max_team : {1, 2, 3, 4}) {
    for (int32_t group = 1; group <= 129; ++group) {
      for (int32_t s_q : {1, 2, 5, 128}) {
        const Shape shape = {
            .requests = 3, .s_q = s_q, .group = group, .h_kv = 2, .max_team = max_team};
        const DecodeGrid g = shape.grid(100);
        EXPECT(g.team >= 1 && g.team <= max_team);
        EXPECT(g.team * g.passes >= g.tiles.num_tiles());
        EXPECT(g.team * (g.passes - 1) < g.tiles.num_tiles());
        EXPECT(g.units_per_request == 2 * g.passes && g.num_units() == 6 * g.passes);
        EXPECT(g.num_teams >= 1 && g.num_ctas() <= 132);
        EXPECT(g.by_passes.divide(g.units_per_request - 1) == 1);
        EXPECT(g.by_passes.divide(g.passes - 1) == 0);
      }
    }
  }
}

TEST(a_grid_has_no_more_teams_than_blocks_and_empty_units) {
  const Shape shape = {.requests = 2, .h_kv = 2};
  EXPECT(shape.grid(0).num_teams == 4);
  EXPECT(shape.grid(1).num_teams == 8);
  EXPECT(shape.grid(1000).num_teams == 132);
  // A team that is larger than the device still is a team.
  const Shape wide = {.requests = 2, .group = 128, .tile_m = 16, .ctas = 1};
  EXPECT(wide.grid(1000).num_teams == 1 && wide.grid(1000).team == 4);
}

TEST(every_block_is_some_teams_work_once) {
  constexpr int32_t kMostUnits = 2000;  // of a batch that is worth the time
  Dice dice = {2};
  int32_t batches = 0, modes[3] = {};
  for (int32_t requests = 1; requests <= 300; ++requests) {
    // Few requests leave teams to spare.
    const int32_t shapes = requests <= 66 ? 160 : 32;
    for (int32_t i = 0; i < shapes; ++i) {
      Shape shape = {.requests = requests};
      shape.s_q = dice.one_of({1, 1, 2, 5, 128});
      shape.group = 1 + dice.below(129);
      shape.h_kv = dice.one_of({1, 2});
      shape.tile_m = dice.one_of({16, 64});
      shape.max_team = dice.one_of({1, 4});
      shape.ctas = dice.one_of({1, 2, 132, 132, 132});
      const int32_t pattern = (requests + i) % kPatterns;
      const Lengths lengths = make_lengths(pattern, requests, dice);
      // block_table may have room for more than there is.
      const DecodeGrid g = shape.grid(longest(lengths) * int64_t{dice.one_of({1, 2})});
      if (g.num_units() > kMostUnits) continue;
      const Schedule s = schedule_of(g, lengths);
      ++batches;
      ++modes[static_cast<int32_t>(s.plan.mode)];
      const char* const broken = broken_rule(g, lengths, s);
      if (broken != nullptr) {
        std::printf(
            "not so: %s (requests %d, s_q %d, group %d, h_kv %d, tile_m %d, max_team %d, ctas %d, "
            "lengths of pattern %d up to %d; mode %d, share %d)\n",
            broken, requests, shape.s_q, shape.group, shape.h_kv, shape.tile_m, shape.max_team,
            shape.ctas, pattern, longest(lengths), static_cast<int32_t>(s.plan.mode), s.plan.share);
      }
      EXPECT(broken == nullptr);
      if (broken != nullptr) return;
    }
  }
  // Otherwise the batches above say little.
  EXPECT(batches > 5000);
  for (int32_t mode : modes) EXPECT(mode > 300);
}

TEST(requests_of_one_length_have_no_more_parts_than_there_are_teams) {
  for (int32_t requests = 1; requests <= 66; ++requests) {
    for (int32_t blocks : {1, 7, 16, 63, 64, 65, 500, 4096}) {
      const Shape shape = {.requests = requests};
      const Lengths lengths(requests, blocks);
      const DecodeGrid g = shape.grid(blocks);
      const Schedule s = schedule_of(g, lengths);
      const char* const broken = broken_rule(g, lengths, s);
      if (broken != nullptr) std::printf("not so: %s (%d of %d)\n", broken, requests, blocks);
      EXPECT(broken == nullptr);
      if (s.plan.mode != PlanMode::kSplitUnits) continue;
      EXPECT(ceil_div(blocks, s.plan.share) * g.num_units() <= g.num_teams);
    }
  }
}

TEST(units_stay_whole_when_splitting_gains_nothing) {
  for (int32_t requests : {1, 2, 7, 132, 264, 300}) {
    for (int32_t blocks : {0, 1, 3, 64, 1000}) {
      // One team has all the work in any case.
      const Shape small = {.requests = requests, .ctas = 1};
      EXPECT(plan_of(small.grid(blocks), Lengths(requests, blocks)).mode == PlanMode::kWhole);
      // As many units as teams, or a multiple of it, all of one length.
      const Shape even = {.requests = requests, .ctas = requests};
      EXPECT(plan_of(even.grid(blocks), Lengths(requests, blocks)).mode == PlanMode::kWhole);
    }
    // A unit that takes less time than meeting another team.
    const Shape shape = {.requests = min_of(requests, 132)};
    for (int32_t blocks : {0, 1, 2, 3, 4}) {
      const Lengths lengths(shape.requests, blocks);
      EXPECT(plan_of(shape.grid(1000), lengths).mode == PlanMode::kWhole);
    }
  }
}

TEST(long_requests_are_spread_over_the_teams) {
  const Shape one = {.requests = 1};
  Schedule s = schedule_of(one.grid(1000), {1000});
  EXPECT(s.plan.mode == PlanMode::kSplitUnits);
  EXPECT(slowest_cost(s) <= 2 * ceil_div(1000, 132));
  // A long one among more short ones than there are teams.
  const Shape many = {.requests = 300};
  Lengths lengths(300, 4);
  lengths[123] = 5000;
  s = schedule_of(many.grid(5000), lengths);
  EXPECT(s.plan.mode == PlanMode::kContiguous);
  EXPECT(slowest_cost(s) <= ceil_div(5000 + 299 * 4 + 300, 132) + 2);
}

TEST(what_cannot_be_counted_is_not_split) {
  for (int32_t requests : {1, 3, 131, 133, 300}) {
    for (int32_t h_kv : {1, 2}) {
      const Shape shape = {.requests = requests, .s_q = 2, .group = 64, .h_kv = h_kv};
      // The last max_blocks with (blocks + units) * teams below 2^32, and the next.
      const int64_t units = shape.grid(1000).num_units();
      const int64_t teams = shape.grid(1000).num_teams;
      const int64_t last = ((int64_t{1} << 32) - 1) / teams / units - 1;
      EXPECT(shape.grid(last).countable);
      const DecodeGrid g = shape.grid(last + 1);
      EXPECT(!g.countable);
      Lengths lengths(requests, 3);
      lengths[requests / 2] = 100000;
      const Schedule s = schedule_of(g, lengths);
      EXPECT(s.plan.mode == PlanMode::kWhole && splits_nothing(s));
      EXPECT(broken_rule(g, lengths, s) == nullptr);
      EXPECT(plan_of(shape.grid(last), lengths).mode != PlanMode::kWhole);
    }
  }
}

TEST(fixed_splits_depend_on_the_length_alone) {
  const DecodeGrid alone = Shape{.requests = 1}.grid(1 << 14, true);
  const Shape crowd = {
      .requests = 300, .s_q = 2, .group = 128, .h_kv = 2, .tile_m = 16, .max_team = 1, .ctas = 2};
  const DecodeGrid crowded = crowd.grid(1 << 20, true);
  for (int32_t blocks = 0; blocks <= 1 << 14; ++blocks) {
    if (alone.fixed_splits(blocks) == crowded.fixed_splits(blocks)) continue;
    EXPECT(alone.fixed_splits(blocks) == crowded.fixed_splits(blocks));
  }
  EXPECT(alone.fixed_splits(0) == 1 && alone.fixed_splits(64) == 1);
  EXPECT(alone.fixed_splits(65) == 2 && alone.fixed_splits(1 << 14) == 4);
  // A narrower block_table gives less room, never another split of what fits.
  for (int32_t most = 0; most <= 400; ++most) {
    const DecodeGrid narrow = Shape{.requests = 5}.grid(most, true);
    for (int32_t blocks = 0; blocks <= most; ++blocks) {
      if (narrow.fixed_splits(blocks) == alone.fixed_splits(blocks)) continue;
      EXPECT(narrow.fixed_splits(blocks) == alone.fixed_splits(blocks));
    }
  }
  EXPECT(Shape{}.grid(1 << 14, false).invariant_splits == 0);
}

TEST(fixed_parts_cover_every_block_once) {
  const DecodeGrid g = Shape{.requests = 9, .h_kv = 2}.grid(1 << 14, true);
  for (int32_t blocks = 0; blocks <= 2000; ++blocks) {
    const int32_t parts = g.fixed_splits(blocks);
    int32_t at = 0;
    bool good = true;
    for (int32_t part = 0; part < parts; ++part) {
      const WorkItem item = fixed_item(g, 7, 1, part, blocks);
      good = good && item.valid() && item.request == 7 && item.unit == 1;
      good = good && item.part == part && item.num_parts == parts;
      good = good && item.block_begin == at && (item.block_end > at || blocks == 0);
      const int32_t length = item.block_end - item.block_begin;
      good = good && (length == blocks / parts || length == blocks / parts + 1);
      at = item.block_end;
    }
    EXPECT(good);
    EXPECT(at == blocks);
  }
}

TEST_MAIN()
