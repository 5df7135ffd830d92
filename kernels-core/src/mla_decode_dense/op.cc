// mla_decode_dense: validate -> select -> launch.
#include "flash_mla/mla_decode_dense.h"

#include "mla_decode_dense/variants.h"
#include "runtime/args.h"
#include "runtime/check.h"
#include "runtime/decode_io.h"
#include "runtime/kv_view.h"

namespace flash_mla {

namespace mla_decode_dense {

namespace {

void check_descale(Check& check, const TensorView& descale, const char* argument, const Problem& p,
                   const float** data, int64_t* stride) {
  *data = nullptr;
  *stride = 0;
  if (!descale.defined()) return;
  check.vector(descale, argument, "[1 or b]", {DType::kFloat32});
  check.same_device(descale, argument, p.device, "q");
  if (!check.ok()) return;
  check.require(
      descale.shape[0] == 1 || descale.shape[0] == p.b, argument,
      [&] { return "have 1 or b = " + std::to_string(p.b) + " elements"; },
      [&] { return shape_string(descale); }, "pass one scale for all requests, or one for each");
  *data = static_cast<const float*>(descale.data);
  *stride = descale.shape[0] == 1 ? 0 : descale.stride[0];
}

}  // namespace

Status Problem::validate(const MlaDecodeDenseArgs& caller, Problem* problem, Outputs outputs) {
  MlaDecodeDenseArgs args;
  FLASH_MLA_RETURN_IF_ERROR(read_args(kOperator, caller, &args));
  Check check(kOperator);
  Problem p = {};

  parse_decode_query(check, args.q, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3}, &p);
  if (!check.ok()) return check.status();
  p.device = args.q.device;

  parse_kv_cache(check, args.kv_cache, "kv_cache", &p.kv);
  check.same_device(args.kv_cache, "kv_cache", p.device, "q");
  if (!check.ok()) return check.status();
  const KvFormat format = p.kv.format;
  const char* format_name = kv_layout(format).name;
  check.require(format == KvFormat::kBf16 || format == KvFormat::kFp16 ||
                    format == KvFormat::kFp8 || format == KvFormat::kV32Fp8,
                "kv_cache", "be in format bf16, fp16, fp8 or v32_fp8", format_name,
                "pass indices: mla_decode_sparse serves this format");
  const int64_t page_size = p.kv.page_size;
  const bool power_of_two = page_size <= 256 && (page_size & (page_size - 1)) == 0;
  check.require(power_of_two || page_size % 64 == 0, "kv_cache",
                "have a page_size (dimension 1) that is a power of two from 1 to 256 or a multiple "
                "of 64",
                page_size, "allocate the cache with such pages");
  check.require(
      p.d_qk == p.kv.d_qk, "q",
      [&] { return "have the d_qk of kv_cache, " + std::to_string(p.kv.d_qk); }, p.d_qk,
      "pass a q and a cache of one width");
  check.require(
      p.h_q > 0 && p.h_q % p.kv.h_kv == 0, "q",
      [&] {
        return "have a number of heads (dimension 2) that h_kv = " + std::to_string(p.kv.h_kv) +
               " divides";
      },
      p.h_q, "pass a multiple of h_kv query heads");
  const bool q_fits = format == KvFormat::kFp16  ? p.q_dtype == DType::kFloat16
                      : format == KvFormat::kFp8 ? p.q_dtype != DType::kFloat16
                                                 : p.q_dtype == DType::kBFloat16;
  check.require(
      q_fits, "q",
      [&] {
        return std::string("have dtype ") +
               (format == KvFormat::kFp16  ? "float16"
                : format == KvFormat::kFp8 ? "bfloat16 or float8_e4m3fn"
                                           : "bfloat16") +
               " with a " + format_name + " cache";
      },
      dtype_name(p.q_dtype), "convert q, or use another cache format");
  p.out_dtype = format == KvFormat::kFp16 ? DType::kFloat16 : DType::kBFloat16;

  check.vector(args.block_table, "block_table", "[b, max_pages]", {DType::kInt32});
  check.size(args.block_table, "block_table", 0, p.b, "b, as q");
  check.same_device(args.block_table, "block_table", p.device, "q");
  p.max_pages = args.block_table.shape[1];
  p.block_table = static_cast<const int32_t*>(args.block_table.data);
  p.block_table_stride_b = args.block_table.stride[0];
  p.block_table_stride_p = args.block_table.stride[1];

  check.vector(args.cache_seqlens, "cache_seqlens", "[b]", {DType::kInt32});
  check.size(args.cache_seqlens, "cache_seqlens", 0, p.b, "b, as q");
  check.same_device(args.cache_seqlens, "cache_seqlens", p.device, "q");
  p.cache_seqlens = static_cast<const int32_t*>(args.cache_seqlens.data);
  p.cache_seqlens_stride = args.cache_seqlens.stride[0];

  check_descale(check, args.descale_q, "descale_q", p, &p.descale_q, &p.descale_q_stride);
  check_descale(check, args.descale_k, "descale_k", p, &p.descale_k, &p.descale_k_stride);
  p.softmax_scale = args.softmax_scale;
  p.causal = args.causal;
  p.batch_invariant = args.batch_invariant;

  parse_decode_results(check, args.out, args.lse, args.head_dim_v, p.device, outputs, &p);
  if (check.ok()) *problem = p;
  return check.status();
}

}  // namespace mla_decode_dense

inline namespace v0 {

Status mla_decode_dense(const MlaDecodeDenseArgs& args, Stream stream) {
  return mla_decode_dense::kVariants.run(args, args.workspace, stream);
}

Status mla_decode_dense_workspace(const MlaDecodeDenseArgs& args, WorkspaceSize* size) {
  return mla_decode_dense::kVariants.workspace(args, size);
}

}  // namespace v0
}  // namespace flash_mla
