// FLASH_MLA_LOG: a comma-separated list of subjects to print on stderr. The only one is "select".
#pragma once

namespace flash_mla {

bool log_enabled(const char* subject);
[[gnu::format(printf, 1, 2)]] void log_line(const char* format, ...);

}  // namespace flash_mla
