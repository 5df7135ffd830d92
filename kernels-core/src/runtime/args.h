// Reading an Args struct that a caller of another minor version may have built.
#pragma once

#include <cstddef>
#include <cstring>

#include "runtime/status.h"

namespace flash_mla {

// Copies the caller's fields over this version's defaults: fields that the caller's (older, hence
// shorter) struct lacks keep their defaults, and fields that this version lacks are refused.
template <class Args>
Status read_args(const char* operator_name, const Args& caller, Args* args) {
  static_assert(offsetof(Args, struct_size) == 0);
  *args = Args{};
  if (caller.struct_size < sizeof(uint32_t) || caller.struct_size > sizeof(Args)) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: struct_size must be at most %zu in this version, got %u; build the "
                       "caller against the headers of the library that it loads",
                       operator_name, sizeof(Args), caller.struct_size);
  }
  std::memcpy(args, &caller, caller.struct_size);
  args->struct_size = sizeof(Args);
  return {};
}

}  // namespace flash_mla
