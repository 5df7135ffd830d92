// Token-sparse MLA prefill over an unpaged bf16 latent.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// Query i attends kv[indices[i, 0, :]]; an index that is negative or >= s_kv is skipped.
struct MlaPrefillSparseArgs {
  uint32_t struct_size = sizeof(MlaPrefillSparseArgs);

  TensorView q;            // [s_q, h_q, d_qk] bf16; d_qk 576 or 512
  TensorView kv;           // [s_kv, 1, d_qk] bf16
  TensorView indices;      // [s_q, 1, topk] int32
  TensorView topk_length;  // optional, [s_q] int32: only the leftmost entries count
  TensorView attn_sink;    // optional, [h_q] float32
  TensorView out;          // [s_q, h_q, 512] bf16
  TensorView max_logits;   // [s_q, h_q] float32: max of softmax_scale * q . k, -inf without keys
  TensorView lse;          // [s_q, h_q] float32, natural log, +inf without keys

  int32_t d_v = 512;  // columns of V; 512 is the only value
  float softmax_scale = 0.0f;

  Workspace workspace;
};

FLASH_MLA_API Status mla_prefill_sparse(const MlaPrefillSparseArgs& args, Stream stream);
FLASH_MLA_API Status mla_prefill_sparse_workspace(const MlaPrefillSparseArgs& args,
                                                  WorkspaceSize* size);

}  // namespace v0
}  // namespace flash_mla
