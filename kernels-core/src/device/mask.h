// Which keys a query attends.
#pragma once

#include <cstdint>

#include "device/macros.h"

namespace flash_mla {

// Keys [0, n) are visible to query i of `num_queries`, aligned to the end of `num_keys`:
// a causal query i attends keys j <= num_keys - num_queries + i.
template <class Int>
FLASH_MLA_HD constexpr Int visible_keys(Int num_keys, Int num_queries, Int i, bool causal) {
  if (!causal) return num_keys;
  const Int limit = num_keys - num_queries + i + 1;
  return limit < 0 ? 0 : limit;
}

// The inverse of visible_keys(): of `num_queries`, the first one that attends `key`.
FLASH_MLA_HD constexpr int64_t first_query(int64_t num_keys, int64_t num_queries, int64_t key,
                                           bool causal) {
  if (!causal) return 0;
  const int64_t first = key - (num_keys - num_queries);
  return first < 0 ? 0 : first;
}

}  // namespace flash_mla
