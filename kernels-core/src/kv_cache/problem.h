// The validated problem of the KV-cache operators, and the parameters their kernels take.
#pragma once

#include "device/paged_kv.h"
#include "flash_mla/kv_cache.h"

namespace flash_mla::kv_cache {

inline constexpr char kOperator[] = "kv_cache";

enum class Direction : int32_t { kAppend, kGather };

// Plain data, passed to kernels by value. Strides are in elements of their tensor.
struct Params {
  Direction direction;
  PagedKv cache;
  int64_t num_tokens;
  void* kv;  // [num_tokens, h_kv, d_qk]
  DType kv_dtype;
  int64_t kv_stride_t, kv_stride_h;
  const void* slot_mapping;  // [num_tokens] int32 or int64
  bool slots_are_int64;
  int64_t slot_stride;
  const float* scale;  // of an fp8 cache; null: 1

  FLASH_MLA_HD int64_t slot(int64_t token) const {
    return slots_are_int64 ? static_cast<const int64_t*>(slot_mapping)[token * slot_stride]
                           : static_cast<const int32_t*>(slot_mapping)[token * slot_stride];
  }
};

// A Params that obeys every rule of the contract: only validate() makes one.
class Problem : public Params {
 public:
  Device device;

  bool empty() const { return num_tokens == 0; }  // there is nothing to copy

  static Status validate(const KvCacheAppendArgs& args, Problem* problem);
  static Status validate(const KvCacheGatherArgs& args, Problem* problem);
};

}  // namespace flash_mla::kv_cache
