#include "runtime/status.h"

#include <cstdarg>
#include <cstdio>

namespace flash_mla {

Status make_status(StatusCode code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list list;
  va_start(list, format);
  std::vsnprintf(status.message, sizeof(status.message), format, list);
  va_end(list);
  return status;
}

}  // namespace flash_mla
