// kv_cache, row portable.
#pragma once

#include "kv_cache/gpu.cuh"

namespace flash_mla::kv_cache::portable {

inline constexpr Row kRow = Row::kPortable;

using kv_cache::supports;
using kv_cache::workspace;

template <class Cfg>
Status launch(const Problem& p, const Workspace&, Stream stream) {
  return launch_move<Cfg, /*kProgrammatic=*/false>(p, stream);
}

}  // namespace flash_mla::kv_cache::portable
