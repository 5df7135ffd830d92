// How a request's keys are split over workers (CTAs or threads). Pure functions.
#pragma once

#include <cstdint>

#include "device/macros.h"

namespace flash_mla {

// Of two integers, in the wider one's type.
template <class A, class B>
FLASH_MLA_HD constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
FLASH_MLA_HD constexpr auto min_of(A a, B b) {
  using T = decltype(a + b);
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
FLASH_MLA_HD constexpr auto max_of(A a, B b) {
  using T = decltype(a + b);
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// Splits begin and end on multiples of this many keys.
inline constexpr int64_t kSplitAlignKeys = 64;

// With batch_invariant a request has min(kInvariantSplits, ceil(keys / kInvariantSplitKeys))
// splits, whatever else is in the batch.
inline constexpr int64_t kInvariantSplits = 4;
inline constexpr int64_t kInvariantSplitKeys = 4096;

struct KeyRange {
  int64_t begin;
  int64_t end;
};

struct SplitPlan {
  int64_t max_splits = 1;  // of any request: the partial results that scratch has room for
  int64_t keys_per_split = kInvariantSplitKeys;  // a request is not cut into smaller pieces

  FLASH_MLA_HD constexpr int64_t splits(int64_t num_keys) const {
    return max_of(1, min_of(max_splits, ceil_div(num_keys, keys_per_split)));
  }
  // The keys of one split; they differ by at most one aligned block between splits.
  FLASH_MLA_HD constexpr KeyRange range(int64_t num_keys, int64_t split) const {
    const int64_t n = splits(num_keys);
    const int64_t blocks = ceil_div(num_keys, kSplitAlignKeys);
    return {min_of(num_keys, blocks * split / n * kSplitAlignKeys),
            min_of(num_keys, blocks * (split + 1) / n * kSplitAlignKeys)};
  }
};

// `tiles`: units of work before splitting; `workers`: how many run at once; `max_keys`: of the
// longest request that the shapes allow.
FLASH_MLA_HD constexpr SplitPlan plan_splits(int64_t tiles, int64_t workers, int64_t max_keys,
                                             bool batch_invariant) {
  if (batch_invariant) {
    return {min_of(kInvariantSplits, max_of(1, ceil_div(max_keys, kInvariantSplitKeys))),
            kInvariantSplitKeys};
  }
  // A few units for each worker even out requests of different lengths; shorter pieces than
  // kMinKeys cost more to combine than they gain.
  constexpr int64_t kUnitsPerWorker = 4;
  constexpr int64_t kMinKeys = 512;
  if (tiles == 0 || tiles >= kUnitsPerWorker * workers) return {1, kMinKeys};
  const int64_t wanted = ceil_div(kUnitsPerWorker * workers, tiles);
  return {max_of(1, min_of(wanted, ceil_div(max_keys, kMinKeys))), kMinKeys};
}

}  // namespace flash_mla
