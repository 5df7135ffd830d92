// The validated problem of mha_prefill_dense_backward, and the parameters its kernels take.
#pragma once

#include "mha_prefill_dense/problem.h"

namespace flash_mla::mha_prefill_dense_backward {

using mha_prefill_dense::TokenRows;

inline constexpr char kOperator[] = "mha_prefill_dense_backward";

// Plain data, passed to kernels by value. The forward's out and lse are read; the gradients are not
// called d_q, d_k, d_v here, where d_v is the width of v.
struct Params : mha_prefill_dense::Params {
  TokenRows grad_out;  // [t_q, h_q, d_v]
  TokenRows grad_q;    // [t_q, h_q, d_qk]
  TokenRows grad_k;    // [t_k, h_kv, d_qk]
  TokenRows grad_v;    // [t_k, h_kv, d_v]
  bool deterministic;
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  // Keys that no query attends have gradients too: zeros.
  bool empty() const { return seqlens_q.tokens == 0 && seqlens_kv.tokens == 0; }

  static Status validate(const MhaPrefillDenseBackwardArgs& args, Problem* problem,
                         Outputs outputs = Outputs::kRequired);
};

}  // namespace flash_mla::mha_prefill_dense_backward
