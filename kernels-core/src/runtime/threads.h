// Threads of the CPU backends.
#pragma once

#include <cstdint>

namespace flash_mla {

// How many threads a CPU backend uses for a call from this thread: set_num_threads(), else what
// OpenMP would take (OMP_NUM_THREADS, the affinity mask).
int num_threads();

// Calls body(i) for i in [0, count), each on some thread. Which thread runs an item must not matter
// for its result.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads()) if (count > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace flash_mla
