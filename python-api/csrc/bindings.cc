// The operators for PyTorch: tensor to view, allocation, device, stream, and nothing else. The
// core checks the arguments. Fake kernels, call forms and autograd are Python's (_ops.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "flash_mla/flash_mla.h"
#include "introspect.h"
#include "tensors.h"

namespace flash_mla_torch {

namespace {

using OptionalTensor = std::optional<Tensor>;

// Out tensors have the query's shape with d_v columns; bf16, or the query's dtype.
Tensor empty_out(const Tensor& q, int64_t d_v) {
  const std::span<const int64_t> q_shape = sizes(q);
  int64_t shape[flash_mla::kMaxRank] = {};
  const size_t rank = std::min<size_t>(q_shape.size(), flash_mla::kMaxRank);
  std::copy_n(q_shape.data(), rank, shape);
  if (rank > 0) shape[rank - 1] = std::max<int64_t>(d_v, 0);
  const DType dtype = dtype_of(q) == DType::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
  return empty({shape, rank}, dtype, q);
}

Tensor empty_decode_lse(const Tensor& q) {
  return empty({size_or_zero(q, 0), size_or_zero(q, 2), size_or_zero(q, 1)}, DType::kFloat32, q);
}

// ask for the workspace (which checks the inputs), allocate it, call.
template <class Args>
void run(Args& args, flash_mla::Status (*workspace_size)(const Args&, flash_mla::WorkspaceSize*),
         flash_mla::Status (*op)(const Args&, flash_mla::Stream), const Tensor& on) {
  const flash_mla::Stream stream = prepare_call(on);
  flash_mla::WorkspaceSize size;
  throw_if_error(workspace_size(args, &size));
  const CallWorkspace workspace(size, on, stream);
  args.workspace = workspace.get();
  throw_if_error(op(args, stream));
}

Tensor mla_decode_dense_out(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                            const Tensor& cache_seqlens, const OptionalTensor& descale_q,
                            const OptionalTensor& descale_k, int64_t head_dim_v,
                            double softmax_scale, bool causal, bool batch_invariant, Tensor& out) {
  Tensor lse = empty_decode_lse(q);
  flash_mla::MlaDecodeDenseArgs args;
  args.q = view(q);
  args.kv_cache = view(kv_cache);
  args.block_table = view(block_table);
  args.cache_seqlens = view(cache_seqlens);
  args.descale_q = view(descale_q);
  args.descale_k = view(descale_k);
  args.out = view(out);
  args.lse = view(lse);
  args.head_dim_v = static_cast<int32_t>(head_dim_v);
  args.softmax_scale = static_cast<float>(softmax_scale);
  args.causal = causal;
  args.batch_invariant = batch_invariant;
  run(args, flash_mla::mla_decode_dense_workspace, flash_mla::mla_decode_dense, q);
  return lse;
}

std::tuple<Tensor, Tensor> mla_decode_dense(const Tensor& q, const Tensor& kv_cache,
                                            const Tensor& block_table, const Tensor& cache_seqlens,
                                            const OptionalTensor& descale_q,
                                            const OptionalTensor& descale_k, int64_t head_dim_v,
                                            double softmax_scale, bool causal,
                                            bool batch_invariant) {
  Tensor out = empty_out(q, head_dim_v);
  Tensor lse = mla_decode_dense_out(q, kv_cache, block_table, cache_seqlens, descale_q, descale_k,
                                    head_dim_v, softmax_scale, causal, batch_invariant, out);
  return {out, lse};
}

Tensor mla_decode_sparse_out(const Tensor& q, const Tensor& kv_cache, const Tensor& indices,
                             const OptionalTensor& topk_length, const OptionalTensor& attn_sink,
                             const OptionalTensor& extra_kv_cache,
                             const OptionalTensor& extra_indices,
                             const OptionalTensor& extra_topk_length, int64_t head_dim_v,
                             double softmax_scale, bool batch_invariant, Tensor& out) {
  Tensor lse = empty_decode_lse(q);
  flash_mla::MlaDecodeSparseArgs args;
  args.q = view(q);
  args.kv_cache = view(kv_cache);
  args.indices = view(indices);
  args.topk_length = view(topk_length);
  args.attn_sink = view(attn_sink);
  args.extra_kv_cache = view(extra_kv_cache);
  args.extra_indices = view(extra_indices);
  args.extra_topk_length = view(extra_topk_length);
  args.out = view(out);
  args.lse = view(lse);
  args.head_dim_v = static_cast<int32_t>(head_dim_v);
  args.softmax_scale = static_cast<float>(softmax_scale);
  args.batch_invariant = batch_invariant;
  run(args, flash_mla::mla_decode_sparse_workspace, flash_mla::mla_decode_sparse, q);
  return lse;
}

std::tuple<Tensor, Tensor> mla_decode_sparse(
    const Tensor& q, const Tensor& kv_cache, const Tensor& indices,
    const OptionalTensor& topk_length, const OptionalTensor& attn_sink,
    const OptionalTensor& extra_kv_cache, const OptionalTensor& extra_indices,
    const OptionalTensor& extra_topk_length, int64_t head_dim_v, double softmax_scale,
    bool batch_invariant) {
  Tensor out = empty_out(q, head_dim_v);
  Tensor lse = mla_decode_sparse_out(q, kv_cache, indices, topk_length, attn_sink, extra_kv_cache,
                                     extra_indices, extra_topk_length, head_dim_v, softmax_scale,
                                     batch_invariant, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor> mla_prefill_sparse_out(const Tensor& q, const Tensor& kv,
                                                  const Tensor& indices,
                                                  const OptionalTensor& topk_length,
                                                  const OptionalTensor& attn_sink, int64_t d_v,
                                                  double softmax_scale, Tensor& out) {
  const int64_t rows[] = {size_or_zero(q, 0), size_or_zero(q, 1)};
  Tensor max_logits = empty(rows, DType::kFloat32, q);
  Tensor lse = empty(rows, DType::kFloat32, q);
  flash_mla::MlaPrefillSparseArgs args;
  args.q = view(q);
  args.kv = view(kv);
  args.indices = view(indices);
  args.topk_length = view(topk_length);
  args.attn_sink = view(attn_sink);
  args.out = view(out);
  args.max_logits = view(max_logits);
  args.lse = view(lse);
  args.d_v = static_cast<int32_t>(d_v);
  args.softmax_scale = static_cast<float>(softmax_scale);
  run(args, flash_mla::mla_prefill_sparse_workspace, flash_mla::mla_prefill_sparse, q);
  return {max_logits, lse};
}

std::tuple<Tensor, Tensor, Tensor> mla_prefill_sparse(const Tensor& q, const Tensor& kv,
                                                      const Tensor& indices,
                                                      const OptionalTensor& topk_length,
                                                      const OptionalTensor& attn_sink, int64_t d_v,
                                                      double softmax_scale) {
  Tensor out = empty_out(q, d_v);
  auto [max_logits, lse] =
      mla_prefill_sparse_out(q, kv, indices, topk_length, attn_sink, d_v, softmax_scale, out);
  return {out, max_logits, lse};
}

Tensor mha_prefill_dense_out(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& cu_seqlens_qo, const Tensor& cu_seqlens_kv,
                             int64_t max_seqlen_qo, int64_t max_seqlen_kv, double softmax_scale,
                             bool causal, Tensor& out) {
  Tensor lse = empty_column_major(size_or_zero(q, 0), size_or_zero(q, 1), q);
  flash_mla::MhaPrefillDenseArgs args;
  args.q = view(q);
  args.k = view(k);
  args.v = view(v);
  args.cu_seqlens_q = view(cu_seqlens_qo);
  args.cu_seqlens_kv = view(cu_seqlens_kv);
  args.out = view(out);
  args.lse = view(lse);
  args.max_seqlen_q = max_seqlen_qo;
  args.max_seqlen_kv = max_seqlen_kv;
  args.softmax_scale = static_cast<float>(softmax_scale);
  args.causal = causal;
  run(args, flash_mla::mha_prefill_dense_workspace, flash_mla::mha_prefill_dense, q);
  return lse;
}

std::tuple<Tensor, Tensor> mha_prefill_dense(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens_qo,
                                             const Tensor& cu_seqlens_kv, int64_t max_seqlen_qo,
                                             int64_t max_seqlen_kv, double softmax_scale,
                                             bool causal) {
  Tensor out = empty_out(q, sizes(v).empty() ? 0 : sizes(v).back());
  Tensor lse = mha_prefill_dense_out(q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo,
                                     max_seqlen_kv, softmax_scale, causal, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> mha_prefill_dense_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_qo, const Tensor& cu_seqlens_kv,
    int64_t max_seqlen_qo, int64_t max_seqlen_kv, double softmax_scale, bool causal,
    bool deterministic) {
  Tensor d_q = empty_as(q);
  Tensor d_k = empty_as(k);
  Tensor d_v = empty_as(v);
  flash_mla::MhaPrefillDenseBackwardArgs args;
  args.d_out = view(d_out);
  args.q = view(q);
  args.k = view(k);
  args.v = view(v);
  args.out = view(out);
  args.lse = view(lse);
  args.cu_seqlens_q = view(cu_seqlens_qo);
  args.cu_seqlens_kv = view(cu_seqlens_kv);
  args.d_q = view(d_q);
  args.d_k = view(d_k);
  args.d_v = view(d_v);
  args.max_seqlen_q = max_seqlen_qo;
  args.max_seqlen_kv = max_seqlen_kv;
  args.softmax_scale = static_cast<float>(softmax_scale);
  args.causal = causal;
  args.deterministic = deterministic;
  run(args, flash_mla::mha_prefill_dense_backward_workspace, flash_mla::mha_prefill_dense_backward,
      q);
  return {d_q, d_k, d_v};
}

Tensor merge_attn_states_out(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                             const Tensor& lse_b, Tensor& out) {
  Tensor lse = empty({size_or_zero(out_a, 0), size_or_zero(out_a, 1)}, DType::kFloat32, out_a);
  flash_mla::MergeAttnStatesArgs args;
  args.out_a = view(out_a);
  args.lse_a = view(lse_a);
  args.out_b = view(out_b);
  args.lse_b = view(lse_b);
  args.out = view(out);
  args.lse = view(lse);
  const flash_mla::Stream stream = prepare_call(out_a);
  throw_if_error(flash_mla::merge_attn_states(args, stream));
  return lse;
}

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b) {
  Tensor out = empty_as(out_a);
  Tensor lse = merge_attn_states_out(out_a, lse_a, out_b, lse_b, out);
  return {out, lse};
}

void kv_cache_append_(const Tensor& kv, Tensor& cache, const Tensor& slot_mapping,
                      std::string format, const OptionalTensor& scale) {
  flash_mla::KvCacheAppendArgs args;
  args.kv = view(kv);
  args.slot_mapping = view(slot_mapping);
  args.cache = view(cache);
  args.scale = view(scale);
  args.format = format_of("kv_cache_append", format);
  const flash_mla::Stream stream = prepare_call(cache);
  throw_if_error(flash_mla::kv_cache_append(args, stream));
}

void kv_cache_gather_out(const Tensor& cache, const Tensor& slot_mapping, std::string format,
                         const OptionalTensor& scale, Tensor& kv) {
  flash_mla::KvCacheGatherArgs args;
  args.cache = view(cache);
  args.slot_mapping = view(slot_mapping);
  args.kv = view(kv);
  args.scale = view(scale);
  args.format = format_of("kv_cache_gather", format);
  const flash_mla::Stream stream = prepare_call(cache);
  throw_if_error(flash_mla::kv_cache_gather(args, stream));
}

Tensor kv_cache_gather(const Tensor& cache, const Tensor& slot_mapping, std::string format,
                       const OptionalTensor& scale, int64_t d_qk,
                       torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const DType kv_dtype = dtype == ScalarType::Float  ? DType::kFloat32
                         : dtype == ScalarType::Half ? DType::kFloat16
                                                     : DType::kBFloat16;
  if (kv_dtype == DType::kBFloat16 && dtype != ScalarType::BFloat16) {
    throw_value_error(
        "kv_cache_gather: dtype must be float32, float16 or bfloat16; convert the result");
  }
  Tensor kv = empty({size_or_zero(slot_mapping, 0), size_or_zero(cache, 2), d_qk}, kv_dtype, cache);
  kv_cache_gather_out(cache, slot_mapping, format, scale, kv);
  return kv;
}

}  // namespace

STABLE_TORCH_LIBRARY(flash_mla, m) {
  m.def(
      "mla_decode_dense(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, "
      "Tensor? descale_q, Tensor? descale_k, int head_dim_v, float softmax_scale, bool causal, "
      "bool batch_invariant) -> (Tensor, Tensor)");
  m.def(
      "mla_decode_dense_out(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, "
      "Tensor? descale_q, Tensor? descale_k, int head_dim_v, float softmax_scale, bool causal, "
      "bool batch_invariant, Tensor(a!) out) -> Tensor");
  m.def(
      "mla_decode_sparse(Tensor q, Tensor kv_cache, Tensor indices, Tensor? topk_length, "
      "Tensor? attn_sink, Tensor? extra_kv_cache, Tensor? extra_indices, "
      "Tensor? extra_topk_length, int head_dim_v, float softmax_scale, bool batch_invariant) "
      "-> (Tensor, Tensor)");
  m.def(
      "mla_decode_sparse_out(Tensor q, Tensor kv_cache, Tensor indices, Tensor? topk_length, "
      "Tensor? attn_sink, Tensor? extra_kv_cache, Tensor? extra_indices, "
      "Tensor? extra_topk_length, int head_dim_v, float softmax_scale, bool batch_invariant, "
      "Tensor(a!) out) -> Tensor");
  m.def(
      "mla_prefill_sparse(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, "
      "Tensor? attn_sink, int d_v, float softmax_scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mla_prefill_sparse_out(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, "
      "Tensor? attn_sink, int d_v, float softmax_scale, Tensor(a!) out) -> (Tensor, Tensor)");
  m.def(
      "mha_prefill_dense(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_qo, "
      "Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, "
      "bool causal) -> (Tensor, Tensor)");
  m.def(
      "mha_prefill_dense_out(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_qo, "
      "Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, "
      "bool causal, Tensor(a!) out) -> Tensor");
  // The same forward with autograd, which inference does not pay for.
  m.def(
      "mha_prefill_dense_train(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_qo, "
      "Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, "
      "bool causal, bool deterministic) -> (Tensor, Tensor)");
  m.def(
      "mha_prefill_dense_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_qo, Tensor cu_seqlens_kv, int max_seqlen_qo, "
      "int max_seqlen_kv, float softmax_scale, bool causal, bool deterministic) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor, Tensor)");
  m.def(
      "merge_attn_states_out(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
      "Tensor(a!) out) -> Tensor");
  m.def(
      "kv_cache_append_(Tensor kv, Tensor(a!) cache, Tensor slot_mapping, str format, "
      "Tensor? scale) -> ()");
  m.def(
      "kv_cache_gather_out(Tensor cache, Tensor slot_mapping, str format, Tensor? scale, "
      "Tensor(a!) kv) -> ()");
  m.def(
      "kv_cache_gather(Tensor cache, Tensor slot_mapping, str format, Tensor? scale, int d_qk, "
      "ScalarType dtype) -> Tensor");
  m.def("kv_cache_format(Tensor cache) -> str");
  m.def("build_info() -> str[]");
  m.def("variants(bool cuda, int index) -> str[]");
}

namespace {

std::tuple<Tensor, Tensor> mha_prefill_dense_train(const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& cu_seqlens_qo,
                                                   const Tensor& cu_seqlens_kv,
                                                   int64_t max_seqlen_qo, int64_t max_seqlen_kv,
                                                   double softmax_scale, bool causal,
                                                   bool deterministic) {
  (void)deterministic;  // of the backward
  return mha_prefill_dense(q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv,
                           softmax_scale, causal);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("mla_decode_dense", TORCH_BOX(&mla_decode_dense));
  m.impl("mla_decode_dense_out", TORCH_BOX(&mla_decode_dense_out));
  m.impl("mla_decode_sparse", TORCH_BOX(&mla_decode_sparse));
  m.impl("mla_decode_sparse_out", TORCH_BOX(&mla_decode_sparse_out));
  m.impl("mla_prefill_sparse", TORCH_BOX(&mla_prefill_sparse));
  m.impl("mla_prefill_sparse_out", TORCH_BOX(&mla_prefill_sparse_out));
  m.impl("mha_prefill_dense", TORCH_BOX(&mha_prefill_dense));
  m.impl("mha_prefill_dense_out", TORCH_BOX(&mha_prefill_dense_out));
  m.impl("mha_prefill_dense_train", TORCH_BOX(&mha_prefill_dense_train));
  m.impl("mha_prefill_dense_backward", TORCH_BOX(&mha_prefill_dense_backward));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));
  m.impl("merge_attn_states_out", TORCH_BOX(&merge_attn_states_out));
  m.impl("kv_cache_append_", TORCH_BOX(&kv_cache_append_));
  m.impl("kv_cache_format", TORCH_BOX(&kv_cache_format));
  m.impl("kv_cache_gather", TORCH_BOX(&kv_cache_gather));
  m.impl("kv_cache_gather_out", TORCH_BOX(&kv_cache_gather_out));
}

}  // namespace

// The core selects by the tensors' device, so both keys have the same kernels.
STABLE_TORCH_LIBRARY_IMPL(flash_mla, CPU, m) { register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(flash_mla, CUDA, m) { register_kernels(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_mla, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("variants", TORCH_BOX(&variants));
}

}  // namespace flash_mla_torch
