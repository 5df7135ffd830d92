// Building a Status.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {

// printf-style; a message longer than Status holds is cut.
[[gnu::format(printf, 2, 3)]] Status make_status(StatusCode code, const char* format, ...);

// Returns from the enclosing function when an expression's Status is not ok.
#define FLASH_MLA_RETURN_IF_ERROR(...)                                              \
  do {                                                                              \
    if (::flash_mla::Status status_ = (__VA_ARGS__); !status_.ok()) return status_; \
  } while (false)

}  // namespace flash_mla
