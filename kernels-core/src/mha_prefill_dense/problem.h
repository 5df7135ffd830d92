// The validated problem of mha_prefill_dense, and the parameters its kernels take.
#pragma once

#include "device/macros.h"
#include "device/scheduler.h"
#include "flash_mla/mha_prefill_dense.h"
#include "runtime/check.h"

namespace flash_mla::mha_prefill_dense {

inline constexpr char kOperator[] = "mha_prefill_dense";

// A tensor [t, h, d] of bf16 or fp16, whose rows of d are contiguous. Strides are in elements.
struct TokenRows {
  void* data;
  int64_t stride_t, stride_h;

  FLASH_MLA_HD uint16_t* row(int64_t token, int64_t head) const {
    return static_cast<uint16_t*>(data) + token * stride_t + head * stride_h;
  }
};

// A float32 tensor [t, h].
struct TokenValues {
  float* data;
  int64_t stride_t, stride_h;

  FLASH_MLA_HD float& at(int64_t token, int64_t head) const {
    return data[token * stride_t + head * stride_h];
  }
};

// Sequence n is tokens [offsets[n], offsets[n + 1]) of a tensor of `tokens`.
struct CuSeqlens {
  const int32_t* offsets;
  int64_t stride;
  int64_t tokens;
  // No sequence is longer; of host tensors it is the longest sequence itself.
  int64_t max_seqlen;

  // Offsets on a device are not checked before the launch: whatever they hold, the tokens of a
  // sequence exist.
  FLASH_MLA_HD int64_t begin(int64_t n) const {
    return max_of(0, min_of(offsets[n * stride], tokens));
  }
  FLASH_MLA_HD int64_t length(int64_t n) const { return max_of(0, begin(n + 1) - begin(n)); }
};

// Plain data, passed to kernels by value.
struct Params {
  int64_t n;  // sequences
  int64_t h_q;
  int64_t h_kv;  // each key head is shared by h_q / h_kv query heads
  int32_t d_qk;
  int32_t d_v;
  DType dtype;  // of q, k, v and out

  TokenRows q;  // [t_q, h_q, d_qk]
  TokenRows k;  // [t_k, h_kv, d_qk]
  TokenRows v;  // [t_k, h_kv, d_v]
  CuSeqlens seqlens_q;
  CuSeqlens seqlens_kv;
  TokenRows out;    // [t_q, h_q, d_v]
  TokenValues lse;  // [t_q, h_q]

  float softmax_scale;
  bool causal;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return seqlens_q.tokens == 0; }  // there is no result to compute

  static Status validate(const MhaPrefillDenseArgs& args, Problem* problem,
                         Outputs outputs = Outputs::kRequired);
};

}  // namespace flash_mla::mha_prefill_dense
