// mla_prefill_sparse: validate -> select -> launch.
#include "flash_mla/mla_prefill_sparse.h"

#include "mla_prefill_sparse/variants.h"
#include "runtime/args.h"
#include "runtime/check.h"

namespace flash_mla {

namespace mla_prefill_sparse {

Status Problem::validate(const MlaPrefillSparseArgs& caller, Problem* problem, Outputs outputs) {
  MlaPrefillSparseArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  check.tensor(args.q, "q", "[s_q, h_q, d_qk]", 3, {DType::kBFloat16});
  check.aligned_rows(args.q, "q");
  if (!check.ok()) return check.status();
  p.device = args.q.device;
  p.s_q = args.q.shape[0];
  p.h_q = args.q.shape[1];
  p.d_qk = static_cast<int32_t>(args.q.shape[2]);
  p.q = args.q.data;
  p.q_stride_s = args.q.stride[0];
  p.q_stride_h = args.q.stride[1];
  check.require(p.d_qk == kLatentDim || p.d_qk == kLatentDim + kRopeDim, "q",
                "have a last dimension (d_qk) of 576 or 512", std::to_string(p.d_qk),
                "pass 512 latent columns, then 64 RoPE columns or none");

  check.tensor(args.kv, "kv", "[s_kv, h_kv, d_qk]", 3, {DType::kBFloat16});
  check.size(args.kv, "kv", 1, 1, "h_kv: one latent for all heads");
  check.size(args.kv, "kv", 2, p.d_qk, "d_qk, as q").aligned_rows(args.kv, "kv");
  check.same_device(args.kv, "kv", p.device, "q");
  p.s_kv = args.kv.shape[0];
  p.kv = args.kv.data;
  p.kv_stride_s = args.kv.stride[0];

  check.vector(args.indices, "indices", "[s_q, h_kv, topk]", {DType::kInt32});
  check.size(args.indices, "indices", 0, p.s_q, "s_q, as q");
  check.size(args.indices, "indices", 1, 1, "h_kv: one latent for all heads");
  check.same_device(args.indices, "indices", p.device, "q");
  p.topk = args.indices.shape[2];
  p.indices = static_cast<const int32_t*>(args.indices.data);
  p.indices_stride_s = args.indices.stride[0];
  p.indices_stride_k = args.indices.stride[2];

  if (args.topk_length.defined()) {
    check.vector(args.topk_length, "topk_length", "[s_q]", {DType::kInt32});
    check.size(args.topk_length, "topk_length", 0, p.s_q, "s_q, as q");
    check.same_device(args.topk_length, "topk_length", p.device, "q");
    p.topk_length = static_cast<const int32_t*>(args.topk_length.data);
    p.topk_length_stride = args.topk_length.stride[0];
  }
  if (args.attn_sink.defined()) {
    check.vector(args.attn_sink, "attn_sink", "[h_q]", {DType::kFloat32});
    check.size(args.attn_sink, "attn_sink", 0, p.h_q, "h_q, as q");
    check.same_device(args.attn_sink, "attn_sink", p.device, "q");
    p.attn_sink = static_cast<const float*>(args.attn_sink.data);
    p.attn_sink_stride = args.attn_sink.stride[0];
  }
  check.require(args.d_v == kLatentDim, "d_v", "be 512", std::to_string(args.d_v),
                "pass 512: V is the first 512 columns of K");
  p.softmax_scale = args.softmax_scale;

  if (outputs == Outputs::kRequired) {
    check.tensor(args.out, "out", "[s_q, h_q, d_v]", 3, {DType::kBFloat16});
    check.size(args.out, "out", 0, p.s_q, "s_q").size(args.out, "out", 1, p.h_q, "h_q");
    check.size(args.out, "out", 2, kLatentDim, "d_v");
    check.aligned_rows(args.out, "out").no_overlap(args.out, "out");
    check.same_device(args.out, "out", p.device, "q");
    p.out = args.out.data;
    p.out_stride_s = args.out.stride[0];
    p.out_stride_h = args.out.stride[1];
    const auto row_values = [&](const TensorView& view, const char* name, float** data,
                                int64_t* stride_s, int64_t* stride_h) {
      check.vector(view, name, "[s_q, h_q]", {DType::kFloat32});
      check.size(view, name, 0, p.s_q, "s_q").size(view, name, 1, p.h_q, "h_q");
      check.no_overlap(view, name).same_device(view, name, p.device, "q");
      *data = static_cast<float*>(view.data);
      *stride_s = view.stride[0];
      *stride_h = view.stride[1];
    };
    row_values(args.max_logits, "max_logits", &p.max_logits, &p.max_logits_stride_s,
               &p.max_logits_stride_h);
    row_values(args.lse, "lse", &p.lse, &p.lse_stride_s, &p.lse_stride_h);
  }
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace mla_prefill_sparse

inline namespace v0 {

Status mla_prefill_sparse(const MlaPrefillSparseArgs& args, Stream stream) {
  return mla_prefill_sparse::kVariants.run(args, args.workspace, stream);
}

Status mla_prefill_sparse_workspace(const MlaPrefillSparseArgs& args, WorkspaceSize* size) {
  return mla_prefill_sparse::kVariants.workspace(args, size);
}

}  // namespace v0
}  // namespace flash_mla
