#include "mha_prefill_dense/inputs.h"

#include <algorithm>

namespace flash_mla::mha_prefill_dense {

namespace {

CuSeqlens parse_cu_seqlens(Check& check, const TensorView& view, const char* argument,
                           const TensorView& q, int64_t tokens, int64_t max_seqlen,
                           const char* max_argument) {
  check.vector(view, argument, "[n + 1]", {DType::kInt32});
  check.same_device(view, argument, q.device, "q");
  if (!check.ok()) return {};
  check.require(view.shape[0] >= 1, argument, "have n + 1 elements for n sequences", "none",
                "pass [0] for no sequence at all");
  check.require(max_seqlen >= 0, max_argument, "not be negative", std::to_string(max_seqlen),
                "pass the length of the longest sequence");
  return {static_cast<const int32_t*>(view.data), view.stride[0], tokens, max_seqlen};
}

void check_offsets(Check& check, const char* argument, const char* max_argument,
                   const char* tokens_of, int64_t n, CuSeqlens* seqlens) {
  const auto offset = [&](int64_t i) -> int64_t { return seqlens->offsets[i * seqlens->stride]; };
  constexpr char kRemedy[] = "it holds the running sum of the sequences' lengths, after a 0";
  check.require(offset(0) == 0, argument, "start with 0", std::to_string(offset(0)), kRemedy);
  int64_t longest = 0;
  for (int64_t i = 0; i < n && check.ok(); ++i) {
    const int64_t length = offset(i + 1) - offset(i);
    if (length < 0) {
      check.require(false, argument, "never fall",
                    std::to_string(offset(i)) + ", then " + std::to_string(offset(i + 1)) +
                        " at index " + std::to_string(i + 1),
                    kRemedy);
    }
    longest = std::max(longest, length);
  }
  if (!check.ok()) return;
  check.require(offset(n) == seqlens->tokens, argument,
                "end with the number of tokens of " + std::string(tokens_of) + ", " +
                    std::to_string(seqlens->tokens),
                std::to_string(offset(n)), kRemedy);
  check.require(seqlens->max_seqlen >= longest, max_argument,
                "be at least the longest sequence of " + std::string(argument) + ", " +
                    std::to_string(longest),
                std::to_string(seqlens->max_seqlen), "pass the length of the longest sequence");
  seqlens->max_seqlen = longest;
}

}  // namespace

TokenRows parse_rows(Check& check, const TensorView& view, const char* argument, const char* dims,
                     const TensorView& q, int64_t tokens, int64_t heads, int64_t width) {
  check.tensor(view, argument, dims, 3, {q.dtype});
  check.size(view, argument, 0, tokens, "tokens").size(view, argument, 1, heads, "heads");
  check.size(view, argument, 2, width, "columns");
  check.aligned_rows(view, argument).same_device(view, argument, q.device, "q");
  return {view.data, view.stride[0], view.stride[1]};
}

TokenValues parse_lse(Check& check, const TensorView& view, const TensorView& q) {
  check.vector(view, "lse", "[t_q, h_q]", {DType::kFloat32});
  check.size(view, "lse", 0, q.shape[0], "t_q, as q").size(view, "lse", 1, q.shape[1], "h_q, as q");
  check.same_device(view, "lse", q.device, "q");
  return {static_cast<float*>(view.data), view.stride[0], view.stride[1]};
}

void parse_inputs(Check& check, const MhaPrefillDenseArgs& args, Params* p) {
  check.tensor(args.q, "q", "[t_q, h_q, d_qk]", 3, {DType::kBFloat16, DType::kFloat16});
  check.aligned_rows(args.q, "q");
  check.tensor(args.k, "k", "[t_k, h_kv, d_qk]", 3, {args.q.dtype});
  check.tensor(args.v, "v", "[t_k, h_kv, d_v]", 3, {args.q.dtype});
  if (!check.ok()) return;
  const int64_t t_q = args.q.shape[0];
  const int64_t t_k = args.k.shape[0];
  p->h_q = args.q.shape[1];
  p->h_kv = args.k.shape[1];
  p->d_qk = static_cast<int32_t>(args.q.shape[2]);
  p->d_v = static_cast<int32_t>(args.v.shape[2]);
  p->dtype = args.q.dtype;
  const std::string widths =
      std::to_string(args.q.shape[2]) + " and " + std::to_string(args.v.shape[2]);
  check.require((args.q.shape[2] == 192 || args.q.shape[2] == 128) && args.v.shape[2] == 128,
                "q and v", "have last dimensions (d_qk, d_v) of (192, 128) or (128, 128)", widths,
                "pass heads of 128 columns; q and k may have 64 RoPE columns more");
  check.require(
      p->h_kv > 0 && p->h_q > 0 && p->h_q % p->h_kv == 0, "q",
      "have a number of heads (dimension 1) that h_kv = " + std::to_string(p->h_kv) + " divides",
      std::to_string(p->h_q), "pass a multiple of h_kv query heads");
  if (!check.ok()) return;

  p->q = {args.q.data, args.q.stride[0], args.q.stride[1]};
  p->k = parse_rows(check, args.k, "k", "[t_k, h_kv, d_qk]", args.q, t_k, p->h_kv, p->d_qk);
  p->v = parse_rows(check, args.v, "v", "[t_k, h_kv, d_v]", args.q, t_k, p->h_kv, p->d_v);

  p->seqlens_q = parse_cu_seqlens(check, args.cu_seqlens_q, "cu_seqlens_q", args.q, t_q,
                                  args.max_seqlen_q, "max_seqlen_q");
  p->seqlens_kv = parse_cu_seqlens(check, args.cu_seqlens_kv, "cu_seqlens_kv", args.q, t_k,
                                   args.max_seqlen_kv, "max_seqlen_kv");
  check.size(args.cu_seqlens_kv, "cu_seqlens_kv", 0, args.cu_seqlens_q.shape[0],
             "n + 1, as cu_seqlens_q");
  p->n = args.cu_seqlens_q.shape[0] - 1;
  p->softmax_scale = args.softmax_scale;
  p->causal = args.causal;
}

void check_sequences(Check& check, Device device, Params* p) {
  if (!check.ok() || device.type != DeviceType::kCpu) return;
  check_offsets(check, "cu_seqlens_q", "max_seqlen_q", "q", p->n, &p->seqlens_q);
  check_offsets(check, "cu_seqlens_kv", "max_seqlen_kv", "k", p->n, &p->seqlens_kv);
}

}  // namespace flash_mla::mha_prefill_dense
