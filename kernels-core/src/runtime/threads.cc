#include "runtime/threads.h"

#include <omp.h>

#include "flash_mla/introspect.h"

namespace flash_mla {

namespace {
thread_local int32_t requested_threads = 0;
}

int num_threads() { return requested_threads > 0 ? requested_threads : omp_get_max_threads(); }

inline namespace v0 {
void set_num_threads(int32_t num_threads) { requested_threads = num_threads; }
}  // namespace v0

}  // namespace flash_mla
