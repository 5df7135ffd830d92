#include "device/scheduler.h"

#include "support.h"

using namespace flash_mla;

namespace {

// The splits of a request cover its keys once, in order, on aligned borders, none empty.
void expect_covers(const SplitPlan& plan, int64_t keys) {
  const int64_t n = plan.splits(keys);
  int64_t at = 0;
  for (int64_t split = 0; split < n; ++split) {
    const KeyRange range = plan.range(keys, split);
    EXPECT(range.begin == at);
    EXPECT(range.end > range.begin || keys == 0);
    EXPECT(range.end == keys || range.end % kSplitAlignKeys == 0);
    at = range.end;
  }
  EXPECT(at == keys);
}

}  // namespace

TEST(splits_cover_every_key_once) {
  for (int64_t tiles : {1, 3, 100}) {
    for (int64_t workers : {1, 2, 64}) {
      for (int64_t keys : {0, 1, 63, 64, 65, 511, 512, 513, 5000, 1000000}) {
        expect_covers(plan_splits(tiles, workers, 1000000, false), keys);
        expect_covers(plan_splits(tiles, workers, 1000000, true), keys);
      }
    }
  }
}

TEST(enough_tiles_are_not_split) {
  EXPECT(plan_splits(8, 2, 1 << 20, false).max_splits == 1);
  EXPECT(plan_splits(1, 2, 1 << 20, false).max_splits > 1);
  EXPECT(plan_splits(0, 2, 1 << 20, false).max_splits == 1);
  EXPECT(plan_splits(1, 64, 100, false).max_splits == 1);
}

TEST(batch_invariant_splits_depend_on_the_request_alone) {
  const SplitPlan alone = plan_splits(1, 64, 1 << 20, true);
  const SplitPlan crowded = plan_splits(1000, 2, 1 << 20, true);
  for (int64_t keys : {0, 4096, 4097, 12288, 12289, 1 << 20}) {
    EXPECT(alone.splits(keys) == crowded.splits(keys));
  }
  EXPECT(alone.splits(4096) == 1 && alone.splits(4097) == 2 && alone.splits(1 << 20) == 4);
  // A narrower block_table gives less room, never another split of what fits.
  EXPECT(plan_splits(1, 64, 5000, true).splits(5000) == alone.splits(5000));
}

TEST_MAIN()
