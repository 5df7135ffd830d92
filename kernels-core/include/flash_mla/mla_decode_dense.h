// Dense MLA decode over a paged latent cache.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// For request b, query i and head h, with V the first 512 columns of K:
//   lse[b, h, i] = ln sum_j exp(softmax_scale * q . k_j),   out = sum_j exp(... - lse) v_j
// over keys j < cache_seqlens[b] and, when causal, j <= cache_seqlens[b] - s_q + i.
// A row without keys has out = 0 and lse = +inf.
struct MlaDecodeDenseArgs {
  uint32_t struct_size = sizeof(MlaDecodeDenseArgs);

  TensorView q;              // [b, s_q, h_q, d_qk] bf16, fp16 or e4m3; d_qk 576 or 512
  TensorView kv_cache;       // [num_pages, page_size, h_kv, d_qk], or [.., 1, 656] bytes (v32_fp8)
  TensorView block_table;    // [b, max_pages] int32
  TensorView cache_seqlens;  // [b] int32, keys of each request
  TensorView descale_q;      // optional, float32 [1] or [b]: q is its elements times this
  TensorView descale_k;      // optional, float32 [1] or [b]: likewise for the cache
  TensorView out;            // [b, s_q, h_q, 512] bf16 or fp16
  TensorView lse;            // [b, h_q, s_q] float32

  int32_t head_dim_v = 512;    // columns of V; 512 is the only value
  float softmax_scale = 0.0f;  // multiplies q . k
  bool causal = false;
  bool batch_invariant = false;  // a request's result depends on that request alone, bit for bit

  Workspace workspace;
};

FLASH_MLA_API Status mla_decode_dense(const MlaDecodeDenseArgs& args, Stream stream);

// Validates all inputs (out and lse may be absent) and tells what `args.workspace` must hold.
FLASH_MLA_API Status mla_decode_dense_workspace(const MlaDecodeDenseArgs& args,
                                                WorkspaceSize* size);

}  // namespace v0
}  // namespace flash_mla
