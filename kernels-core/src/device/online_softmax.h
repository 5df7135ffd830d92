// The softmax's conventions: base 2 inside, natural log outside, and what an empty row gives.
//
// A row keeps the running maximum m of its logits (in units of log2) and l = sum 2^(s - m).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "device/macros.h"

namespace flash_mla {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A running maximum may stay this far, in units of log2, below the row's true one: exponentials are
// then up to 2^8, which 16-bit types hold as precisely as those up to 1, and accumulators need not
// be rescaled for each new maximum.
inline constexpr float kRescaleThresholdLog2 = 8.0f;

// What a row without keys reports: out 0, lse +inf, max_logits -inf.
inline constexpr float kEmptyLse = kInfinity;
inline constexpr float kEmptyMaxLogit = -kInfinity;

struct SoftmaxRow {
  float max_log2 = -kInfinity;
  float sum = 0.0f;

  FLASH_MLA_HD bool empty() const { return sum == 0.0f; }
  FLASH_MLA_HD float lse() const {
    return empty() ? kEmptyLse : (max_log2 + std::log2(sum)) * kLn2;
  }
};

// A part of a merge is empty when its lse is infinite, of either sign.
FLASH_MLA_HD bool is_empty_lse(float lse) { return std::fabs(lse) == kInfinity; }

// The factor that an attention sink puts on a row's output: exp(lse) / (exp(lse) + exp(sink)).
FLASH_MLA_HD float sink_factor(float lse, float sink) {
  if (is_empty_lse(lse)) return 0.0f;
  return 1.0f / (1.0f + std::exp2((sink - lse) * kLog2e));
}

// The merge of parts of a row: part i has the weight exp(lse_i - lse). First add_max each part's
// lse, then add_sum.
struct MergeRow {
  float max = -kInfinity;
  float sum = 0.0f;

  FLASH_MLA_HD void add_max(float lse) {
    if (!is_empty_lse(lse) && lse > max) max = lse;
  }
  FLASH_MLA_HD float unscaled_weight(float lse) const {
    return is_empty_lse(lse) ? 0.0f : std::exp2((lse - max) * kLog2e);
  }
  FLASH_MLA_HD void add_sum(float lse) { sum += unscaled_weight(lse); }
  FLASH_MLA_HD bool empty() const { return sum == 0.0f; }
  FLASH_MLA_HD float weight(float lse) const { return empty() ? 0.0f : unscaled_weight(lse) / sum; }
  FLASH_MLA_HD float lse() const { return empty() ? kEmptyLse : max + std::log(sum); }
};

struct MergeWeights {
  float a;
  float b;
  float lse;
};

FLASH_MLA_HD MergeWeights merge_weights(float lse_a, float lse_b) {
  MergeRow row;
  row.add_max(lse_a);
  row.add_max(lse_b);
  row.add_sum(lse_a);
  row.add_sum(lse_b);
  return {row.weight(lse_a), row.weight(lse_b), row.lse()};
}

}  // namespace flash_mla
