// mla_prefill_sparse on the CPU. A unit of work is a tile of heads of one query.
#include <algorithm>

#include "device/cpu/attend.h"
#include "device/cpu/token.h"
#include "device/scheduler.h"
#include "mla_prefill_sparse/problem.h"
#include "runtime/threads.h"
#include "runtime/variant.h"

namespace flash_mla::mla_prefill_sparse {

namespace {

using cpu::kBlockKeys;
using cpu::kTileRows;

void attend(const Params& p, int64_t query, int64_t tile) {
  const int64_t first_head = tile * kTileRows;
  const int count = static_cast<int>(std::min<int64_t>(kTileRows, p.h_q - first_head));
  const auto* q = static_cast<const uint16_t*>(p.q) + query * p.q_stride_s;
  const auto* kv = static_cast<const uint16_t*>(p.kv);

  cpu::QueryTile queries(count, p.d_qk, kLatentDim, p.softmax_scale);
  for (int r = 0; r < count; ++r) {
    cpu::load_row(DType::kBFloat16, q + (first_head + r) * p.q_stride_h, p.d_qk, queries.q(r));
  }

  const cpu::FloatBuffer k(int64_t{kBlockKeys} * p.d_qk);
  const int64_t tokens =
      p.topk_length == nullptr
          ? p.topk
          : std::clamp<int64_t>(p.topk_length[query * p.topk_length_stride], 0, p.topk);
  for (int64_t begin = 0; begin < tokens; begin += kBlockKeys) {
    const int64_t end = std::min(begin + kBlockKeys, tokens);
    int n = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t token = p.indices[query * p.indices_stride_s + j * p.indices_stride_k];
      if (token < 0 || token >= p.s_kv) continue;
      cpu::load_row(DType::kBFloat16, kv + token * p.kv_stride_s, p.d_qk,
                    k + int64_t{n++} * p.d_qk);
    }
    int visible[kTileRows];
    std::fill_n(visible, count, n);
    queries.attend(k.get(), p.d_qk, k.get(), p.d_qk, n, visible);
  }
  queries.finish();

  for (int r = 0; r < count; ++r) {
    const int64_t head = first_head + r;
    const float lse = queries.lse(r);
    const float factor =
        p.attn_sink == nullptr ? 1.0f : sink_factor(lse, p.attn_sink[head * p.attn_sink_stride]);
    auto* out = static_cast<uint16_t*>(p.out) + query * p.out_stride_s + head * p.out_stride_h;
    cpu::store_row(DType::kBFloat16, queries.out(r), kLatentDim, factor, out);
    p.lse[query * p.lse_stride_s + head * p.lse_stride_h] = lse;
    p.max_logits[query * p.max_logits_stride_s + head * p.max_logits_stride_h] =
        queries.max_logit(r);
  }
}

Status launch(const Problem& p, const Workspace&, Stream) {
  const int64_t tiles = ceil_div(p.h_q, kTileRows);
  parallel_for(p.s_q * tiles, [&](int64_t unit) { attend(p, unit / tiles, unit % tiles); });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       no_workspace<Problem>, launch};

}  // namespace flash_mla::mla_prefill_sparse
