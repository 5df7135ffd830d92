#include "runtime/log.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace flash_mla {

bool log_enabled(const char* subject) {
  const char* subjects = std::getenv("FLASH_MLA_LOG");
  if (subjects == nullptr) return false;
  const size_t length = std::strlen(subject);
  for (const char* at = subjects; (at = std::strstr(at, subject)) != nullptr; at += length) {
    const bool starts = at == subjects || at[-1] == ',';
    const bool ends = at[length] == '\0' || at[length] == ',';
    if (starts && ends) return true;
  }
  return false;
}

void log_line(const char* format, ...) {
  char line[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(line, sizeof(line), format, list);
  va_end(list);
  std::fprintf(stderr, "flash_mla: %s\n", line);
}

}  // namespace flash_mla
