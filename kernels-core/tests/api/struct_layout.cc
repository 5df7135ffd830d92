// Prints the binary layout of the public API, which struct_layout.txt records: for each struct its
// size and its fields (offset+size), for each enum its numbers. A field that is added does not
// compile until it is named here, even one that hides in padding.
#include <cstdio>
#include <string>

#include "flash_mla/flash_mla.h"

using namespace flash_mla;

namespace {

// `names` is the text of an argument list; the next name of it.
std::string next_name(const char** names) {
  while (**names == ' ' || **names == ',') ++*names;
  std::string name;
  while (**names != '\0' && **names != ',') name += *(*names)++;
  return name;
}

template <class Struct, class... Fields>
void print_struct(const char* type, const char* names, const Struct& object,
                  const Fields&... fields) {
  std::printf("%s %zu:", type, sizeof(Struct));
  const auto offset = [&](const auto& field) {
    return reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&object);
  };
  (std::printf(" %s %td+%zu", next_name(&names).c_str(), offset(fields), sizeof(fields)), ...);
  std::printf("\n");
}

template <class... Values>
void print_enum(const char* type, const char* names, Values... values) {
  std::printf("%s:", type);
  (std::printf(" %s %d", next_name(&names).c_str(), static_cast<int>(values)), ...);
  std::printf("\n");
}

#define STRUCT(type, ...)                                   \
  {                                                         \
    const type object;                                      \
    const auto& [__VA_ARGS__] = object;                     \
    print_struct(#type, #__VA_ARGS__, object, __VA_ARGS__); \
  }
#define ENUM(type, ...)                           \
  {                                               \
    using enum type;                              \
    print_enum(#type, #__VA_ARGS__, __VA_ARGS__); \
  }

}  // namespace

int main() {
  ENUM(DType, kUnknown, kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kUInt8, kInt8, kInt32, kInt64,
       kFloat64, kFloat8E5M2, kInt16, kBool)
  ENUM(DeviceType, kCpu, kCuda)
  ENUM(StatusCode, kOk, kInvalidArgument, kUnsupported, kRuntimeError)
  ENUM(KvFormat, kBf16, kFp16, kFp8, kV32Fp8, kV4Fp8, kV41Fp8, kV41Fp4)

  STRUCT(Device, type, index)
  STRUCT(TensorView, data, dtype, device, rank, shape, stride)
  STRUCT(Status, code, message)
  STRUCT(WorkspaceSize, scratch_bytes, sync_bytes)
  STRUCT(Workspace, scratch, scratch_bytes, sync, sync_bytes)
  STRUCT(VariantInfo, operator_name, name, row)
  STRUCT(KvFormatInfo, name, d_qk, d_nope, bytes_per_token, scale_tile, page_align_bytes)

  STRUCT(MlaDecodeDenseArgs, struct_size, q, kv_cache, block_table, cache_seqlens, descale_q,
         descale_k, out, lse, head_dim_v, softmax_scale, causal, batch_invariant, workspace)
  STRUCT(MlaDecodeSparseArgs, struct_size, q, kv_cache, indices, topk_length, attn_sink,
         extra_kv_cache, extra_indices, extra_topk_length, out, lse, head_dim_v, softmax_scale,
         batch_invariant, workspace)
  STRUCT(MlaPrefillSparseArgs, struct_size, q, kv, indices, topk_length, attn_sink, out, max_logits,
         lse, d_v, softmax_scale, workspace)
  STRUCT(MhaPrefillDenseArgs, struct_size, q, k, v, cu_seqlens_q, cu_seqlens_kv, out, lse,
         max_seqlen_q, max_seqlen_kv, softmax_scale, causal, workspace)
  STRUCT(MhaPrefillDenseBackwardArgs, struct_size, d_out, q, k, v, out, lse, cu_seqlens_q,
         cu_seqlens_kv, d_q, d_k, d_v, max_seqlen_q, max_seqlen_kv, softmax_scale, causal,
         deterministic, workspace)
  STRUCT(MergeAttnStatesArgs, struct_size, out_a, lse_a, out_b, lse_b, out, lse)
  STRUCT(KvCacheAppendArgs, struct_size, kv, slot_mapping, cache, scale, format)
  STRUCT(KvCacheGatherArgs, struct_size, cache, slot_mapping, kv, scale, format)
}
