// The attention of a few query rows over a stream of keys, in float32: what every CPU backend's
// forward pass is made of.
#pragma once

#include <memory>
#include <vector>

#include "device/cpu/tile.h"
#include "device/online_softmax.h"

namespace flash_mla::cpu {

// Floats on a 64-byte boundary, uninitialised.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  explicit FloatBuffer(int64_t count) : data_(new (kAlignment) float[count]) {}
  float* get() const { return data_.get(); }
  float* operator+(int64_t offset) const { return data_.get() + offset; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* data) const { operator delete[](data, kAlignment); }
  };
  std::unique_ptr<float[], Free> data_;
};

// Rows of a tile and keys of a block: Q, O and K of 32 x 576, 32 x 512 and 64 x 576 floats, 288 KB,
// stay in a second-level cache.
inline constexpr int kTileRows = 32;
inline constexpr int kBlockKeys = 64;

class QueryTile {
 public:
  QueryTile(int rows, int d_qk, int d_v, float softmax_scale);

  int rows() const { return rows_; }
  // Where row i's query goes, before the first attend().
  float* q(int i) { return q_ + int64_t{i} * d_qk_; }
  // Multiplies the logits, beside softmax_scale: the scales of an fp8 query and cache.
  void set_logit_factor(float factor) { scale_ = softmax_scale_ * factor; }

  // One block of n <= kBlockKeys keys. visible[i]: row i attends the first visible[i] of them.
  void attend(const float* k, int64_t ldk, const float* v, int64_t ldv, int n, const int* visible);

  // After the last block. out(i) is normalised; an empty row is all zeros.
  void finish();
  const float* out(int i) const { return o_ + int64_t{i} * d_v_; }
  float lse(int i) const { return softmax_[i].lse(); }
  // The largest logit, softmax_scale * q . k.
  float max_logit(int i) const {
    return softmax_[i].empty() ? kEmptyMaxLogit : softmax_[i].max_log2 * kLn2;
  }

 private:
  int rows_;
  int d_qk_;
  int d_v_;
  float softmax_scale_;
  float scale_;
  FloatBuffer q_;
  FloatBuffer o_;
  FloatBuffer s_;
  std::vector<SoftmaxRow> softmax_;
};

}  // namespace flash_mla::cpu
