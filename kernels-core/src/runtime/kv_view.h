// A cache tensor as the kernels see it.
#pragma once

#include "device/paged_kv.h"
#include "flash_mla/types.h"
#include "runtime/check.h"

namespace flash_mla {

// Recognises the cache's format from dtype and last dimension, checks shape and strides, and fills
// `kv`. The d_qk of a packed format is the format's own.
void parse_kv_cache(Check& check, const TensorView& cache, const char* argument, PagedKv* kv);

// The same for a cache whose format the caller names: packing into it.
void parse_kv_cache_as(Check& check, const TensorView& cache, const char* argument, KvFormat format,
                       PagedKv* kv);

}  // namespace flash_mla
