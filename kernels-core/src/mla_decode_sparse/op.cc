// mla_decode_sparse: validate -> select -> launch.
#include "flash_mla/mla_decode_sparse.h"

#include "mla_decode_sparse/variants.h"
#include "runtime/args.h"
#include "runtime/check.h"
#include "runtime/decode_io.h"
#include "runtime/kv_view.h"

namespace flash_mla {

namespace mla_decode_sparse {

namespace {

// A cache with its indices and lengths; the names are those of the arguments.
void check_token_set(Check& check, const Problem& p, const TensorView& cache,
                     const char* cache_name, const TensorView& indices, const char* indices_name,
                     const TensorView& topk_length, const char* length_name, TokenSet* set) {
  parse_kv_cache(check, cache, cache_name, &set->kv);
  check.same_device(cache, cache_name, p.device, "q");
  if (!check.ok()) return;
  const KvFormat format = set->kv.format;
  check.require(format != KvFormat::kFp16 && format != KvFormat::kFp8, cache_name,
                "be in format bf16, v32_fp8, v4_fp8, v41_fp8 or v41_fp4", kv_layout(format).name,
                "leave indices out: mla_decode_dense serves this format");
  check.require(set->kv.h_kv == 1, cache_name, "have 1 key head (dimension 2)",
                std::to_string(set->kv.h_kv),
                "pass one head: the indices name tokens of one latent");
  check.require(set->kv.d_qk == p.d_qk, "q",
                "have the d_qk of " + std::string(cache_name) + ", " + std::to_string(set->kv.d_qk),
                std::to_string(p.d_qk), "pass a q and a cache of one width");

  check.vector(indices, indices_name, "[b, s_q, topk]", {DType::kInt32});
  check.size(indices, indices_name, 0, p.b, "b, as q");
  check.size(indices, indices_name, 1, p.s_q, "s_q, as q");
  check.same_device(indices, indices_name, p.device, "q");
  set->indices = static_cast<const int32_t*>(indices.data);
  set->topk = indices.shape[2];
  set->indices_stride_b = indices.stride[0];
  set->indices_stride_s = indices.stride[1];
  set->indices_stride_k = indices.stride[2];

  set->topk_length = nullptr;
  if (!topk_length.defined()) return;
  check.vector(topk_length, length_name, "[b]", {DType::kInt32});
  check.size(topk_length, length_name, 0, p.b, "b, as q");
  check.same_device(topk_length, length_name, p.device, "q");
  set->topk_length = static_cast<const int32_t*>(topk_length.data);
  set->topk_length_stride = topk_length.stride[0];
}

}  // namespace

Status Problem::validate(const MlaDecodeSparseArgs& caller, Problem* problem, Outputs outputs) {
  MlaDecodeSparseArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  parse_decode_query(check, args.q, {DType::kBFloat16}, &p);
  if (!check.ok()) return check.status();
  p.device = args.q.device;
  p.out_dtype = p.q_dtype;

  check_token_set(check, p, args.kv_cache, "kv_cache", args.indices, "indices", args.topk_length,
                  "topk_length", &p.main);
  check.require(p.main.kv.format != KvFormat::kV41Fp4, "kv_cache",
                "be in another format: v41_fp4 is one of the extra cache",
                kv_layout(p.main.kv.format).name, "pass a v41_fp8 cache here");
  if (args.extra_kv_cache.defined()) {
    check_token_set(check, p, args.extra_kv_cache, "extra_kv_cache", args.extra_indices,
                    "extra_indices", args.extra_topk_length, "extra_topk_length", &p.extra);
    const KvFormat format = p.extra.kv.format;
    check.require(format == p.main.kv.format ||
                      (p.main.kv.format == KvFormat::kV41Fp8 && format == KvFormat::kV41Fp4),
                  "extra_kv_cache",
                  std::string("have the format of kv_cache, ") + kv_layout(p.main.kv.format).name +
                      ", or be v41_fp4 beside v41_fp8",
                  kv_layout(format).name, "pack both caches alike");
  } else {
    check.require(!args.extra_indices.defined(), "extra_indices", "come with extra_kv_cache",
                  "indices without a cache", "pass both or neither");
    check.require(!args.extra_topk_length.defined(), "extra_topk_length",
                  "come with extra_kv_cache", "lengths without a cache", "pass both or neither");
  }

  if (args.attn_sink.defined()) {
    check.vector(args.attn_sink, "attn_sink", "[h_q]", {DType::kFloat32});
    check.size(args.attn_sink, "attn_sink", 0, p.h_q, "h_q, as q");
    check.same_device(args.attn_sink, "attn_sink", p.device, "q");
    p.attn_sink = static_cast<const float*>(args.attn_sink.data);
    p.attn_sink_stride = args.attn_sink.stride[0];
  }
  p.softmax_scale = args.softmax_scale;
  p.batch_invariant = args.batch_invariant;

  parse_decode_results(check, args.out, args.lse, args.head_dim_v, p.device, outputs, &p);
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace mla_decode_sparse

inline namespace v0 {

Status mla_decode_sparse(const MlaDecodeSparseArgs& args, Stream stream) {
  return mla_decode_sparse::kVariants.run(args, args.workspace, stream);
}

Status mla_decode_sparse_workspace(const MlaDecodeSparseArgs& args, WorkspaceSize* size) {
  return mla_decode_sparse::kVariants.workspace(args, size);
}

}  // namespace v0
}  // namespace flash_mla
