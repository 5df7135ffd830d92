// merge_attn_states, row portable.
#pragma once

#include "split_kv_combine/merge.cuh"

namespace flash_mla::split_kv_combine::portable {

inline constexpr Row kRow = Row::kPortable;

using split_kv_combine::supports;
using split_kv_combine::workspace;

template <class Cfg>
Status launch(const Problem& p, const Workspace&, Stream stream) {
  return launch_merge<Cfg, /*kProgrammatic=*/false>(p, stream);
}

}  // namespace flash_mla::split_kv_combine::portable
