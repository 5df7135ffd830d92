#include "device/cpu/attend.h"

#include <algorithm>

namespace flash_mla::cpu {

QueryTile::QueryTile(int rows, int d_qk, int d_v, float softmax_scale)
    : rows_(rows),
      d_qk_(d_qk),
      d_v_(d_v),
      softmax_scale_(softmax_scale),
      scale_(softmax_scale),
      q_(int64_t{rows} * d_qk),
      o_(int64_t{rows} * d_v),
      s_(int64_t{rows} * kBlockKeys),
      softmax_(rows) {
  std::fill_n(o_.get(), int64_t{rows} * d_v, 0.0f);
}

void QueryTile::attend(const float* k, int64_t ldk, const float* v, int64_t ldv, int n,
                       const int* visible) {
  const Ops& op = ops();
  op.dot_rows(q_.get(), d_qk_, rows_, k, ldk, n, d_qk_, s_.get(), kBlockKeys);
  const float scale_log2 = scale_ * kLog2e;
  Span spans[kTileRows];
  for (int i = 0; i < rows_; ++i) {
    spans[i] = {0, visible[i]};
    if (visible[i] == 0) continue;
    SoftmaxRow& row = softmax_[i];
    float* s = s_ + int64_t{i} * kBlockKeys;
    // With a negative scale the largest logit is the smallest product.
    if (scale_log2 < 0) op.scale_row(s, kBlockKeys, -1.0f);
    const float magnitude = scale_log2 < 0 ? -scale_log2 : scale_log2;
    const float block_max = op.row_max(s, visible[i]) * magnitude;
    if (block_max > row.max_log2) {
      const float correction = std::exp2(row.max_log2 - block_max);
      row.sum *= correction;
      if (correction != 1.0f) op.scale_row(o_ + int64_t{i} * d_v_, d_v_, correction);
      row.max_log2 = block_max;
    }
    // All logits so far are -inf: any finite shift gives them the weight 0.
    const float shift = row.max_log2 == -kInfinity ? 0.0f : row.max_log2;
    row.sum += op.exp2_row(s, visible[i], magnitude, shift);
  }
  op.accumulate(s_.get(), kBlockKeys, spans, rows_, v, ldv, d_v_, o_.get(), d_v_);
}

void QueryTile::finish() {
  for (int i = 0; i < rows_; ++i) {
    if (softmax_[i].empty()) continue;
    ops().scale_row(o_ + int64_t{i} * d_v_, d_v_, 1.0f / softmax_[i].sum);
  }
}

}  // namespace flash_mla::cpu
