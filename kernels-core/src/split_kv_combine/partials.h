// The partial results of rows whose keys were split: in scratch, float32, normalised.
#pragma once

#include <cstdint>

#include "device/online_softmax.h"
#include "flash_mla/types.h"

namespace flash_mla::split_kv_combine {

struct Partials {
  int64_t num_rows = 0;
  int64_t max_splits = 1;
  int32_t d_v = 0;
  float* data = nullptr;

  // Scratch for these sizes; nothing when no row is split.
  constexpr int64_t bytes() const {
    return max_splits == 1 ? 0 : num_rows * max_splits * (d_v + 1) * int64_t{sizeof(float)};
  }
  FLASH_MLA_HD float* out(int64_t row, int64_t split) const {
    return data + (row * max_splits + split) * d_v;
  }
  FLASH_MLA_HD float* lse(int64_t row, int64_t split) const {
    return data + num_rows * max_splits * d_v + row * max_splits + split;
  }
};

// Host: merges the first `splits` parts of a row into out (d_v floats), and gives its lse.
inline float merge_row(const Partials& partials, int64_t row, int64_t splits, float* out) {
  MergeRow merge;
  for (int64_t i = 0; i < splits; ++i) merge.add_max(*partials.lse(row, i));
  for (int64_t i = 0; i < splits; ++i) merge.add_sum(*partials.lse(row, i));
  for (int32_t c = 0; c < partials.d_v; ++c) out[c] = 0.0f;
  if (merge.empty()) return kEmptyLse;
  for (int64_t i = 0; i < splits; ++i) {
    const float weight = merge.weight(*partials.lse(row, i));
    if (weight == 0.0f) continue;  // an empty part, or one too small to count
    const float* part = partials.out(row, i);
    for (int32_t c = 0; c < partials.d_v; ++c) out[c] += weight * part[c];
  }
  return merge.lse();
}

}  // namespace flash_mla::split_kv_combine
