// What the core tells about itself, as strings: config.py and kv_cache.py read them.
#pragma once

#include <string>
#include <vector>

#include "flash_mla/kv_cache.h"
#include "tensors.h"

namespace flash_mla_torch {

// The format of that name; throws what becomes ValueError for any other.
flash_mla::KvFormat format_of(const char* operator_name, const std::string& name);

// The name of a cache tensor's format.
std::string kv_cache_format(const Tensor& cache);

// Lines "key=value": versions and instruction sets, and "kv_format=name,d_qk,..." for each format.
std::vector<std::string> build_info();

// Lines "operator,variant,row,reason" for a device; an empty reason means that the row runs there.
std::vector<std::string> variants(bool cuda, int64_t index);

}  // namespace flash_mla_torch
