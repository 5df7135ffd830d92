// Dense multi-head attention over variable-length sequences: forward and backward.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// Sequence n owns rows cu_seqlens_q[n] .. cu_seqlens_q[n + 1] of q and, likewise, of k and v.
// Query i of len_q attends key j of len_k when not causal, or when j <= len_k - len_q + i.
// Query head h reads key head h / (h_q / h_kv).
struct MhaPrefillDenseArgs {
  uint32_t struct_size = sizeof(MhaPrefillDenseArgs);

  TensorView q;              // [t_q, h_q, d_qk] bf16 or fp16
  TensorView k;              // [t_k, h_kv, d_qk]
  TensorView v;              // [t_k, h_kv, d_v]; (d_qk, d_v) is (192, 128) or (128, 128)
  TensorView cu_seqlens_q;   // [n + 1] int32, starts with 0, never falls, ends with t_q
  TensorView cu_seqlens_kv;  // [n + 1] int32
  TensorView out;            // [t_q, h_q, d_v] as q
  TensorView lse;            // [t_q, h_q] float32 (stored head-major), +inf for rows without keys

  int64_t max_seqlen_q = 0;  // at least the longest sequence of q
  int64_t max_seqlen_kv = 0;
  float softmax_scale = 0.0f;
  bool causal = false;

  Workspace workspace;
};

struct MhaPrefillDenseBackwardArgs {
  uint32_t struct_size = sizeof(MhaPrefillDenseBackwardArgs);

  TensorView d_out;  // [t_q, h_q, d_v]
  TensorView q;      // as in the forward
  TensorView k;
  TensorView v;
  TensorView out;  // the forward's results
  TensorView lse;
  TensorView cu_seqlens_q;
  TensorView cu_seqlens_kv;
  TensorView d_q;  // gradients, each like its tensor
  TensorView d_k;
  TensorView d_v;

  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_kv = 0;
  float softmax_scale = 0.0f;
  bool causal = false;
  bool deterministic = false;  // bitwise the same gradients from run to run

  Workspace workspace;
};

FLASH_MLA_API Status mha_prefill_dense(const MhaPrefillDenseArgs& args, Stream stream);
FLASH_MLA_API Status mha_prefill_dense_workspace(const MhaPrefillDenseArgs& args,
                                                 WorkspaceSize* size);
FLASH_MLA_API Status mha_prefill_dense_backward(const MhaPrefillDenseBackwardArgs& args,
                                                Stream stream);
FLASH_MLA_API Status mha_prefill_dense_backward_workspace(const MhaPrefillDenseBackwardArgs& args,
                                                          WorkspaceSize* size);

}  // namespace v0
}  // namespace flash_mla
