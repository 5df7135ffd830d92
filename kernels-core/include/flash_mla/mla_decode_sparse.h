// Token-sparse MLA decode over packed caches (DeepSeek Sparse Attention).
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// As mla_decode_dense, but query (b, i) attends the tokens that indices[b, i, :] names:
// flat positions page * page_size + offset. Anything outside the cache is an invalid index and
// is skipped. A second cache is attended in the same softmax.
struct MlaDecodeSparseArgs {
  uint32_t struct_size = sizeof(MlaDecodeSparseArgs);

  TensorView q;                  // [b, s_q, h_q, d_qk] bf16; d_qk 576 or 512
  TensorView kv_cache;           // [num_pages, page_size, 1, bytes_per_token or d_qk]
  TensorView indices;            // [b, s_q, topk] int32
  TensorView topk_length;        // optional, [b] int32: only the leftmost entries count
  TensorView attn_sink;          // optional, [h_q] float32: out *= exp(lse)/(exp(lse)+exp(sink))
  TensorView extra_kv_cache;     // optional second cache, its own page size
  TensorView extra_indices;      // [b, s_q, extra_topk] int32, with extra_kv_cache
  TensorView extra_topk_length;  // optional, [b] int32
  TensorView out;                // [b, s_q, h_q, 512] as q
  TensorView lse;                // [b, h_q, s_q] float32, without the sink

  int32_t head_dim_v = 512;  // columns of V; 512 is the only value
  float softmax_scale = 0.0f;
  bool batch_invariant = false;

  Workspace workspace;
};

FLASH_MLA_API Status mla_decode_sparse(const MlaDecodeSparseArgs& args, Stream stream);
FLASH_MLA_API Status mla_decode_sparse_workspace(const MlaDecodeSparseArgs& args,
                                                 WorkspaceSize* size);

}  // namespace v0
}  // namespace flash_mla
