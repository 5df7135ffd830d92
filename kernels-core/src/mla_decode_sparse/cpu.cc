// mla_decode_sparse on the CPU. A unit of work is a tile of heads of one query, over one split of
// the query's tokens: those of the main cache, then those of the extra one. A second pass merges
// the splits.
#include <algorithm>

#include "device/cpu/attend.h"
#include "device/cpu/token.h"
#include "device/scheduler.h"
#include "mla_decode_sparse/problem.h"
#include "runtime/threads.h"
#include "runtime/variant.h"
#include "split_kv_combine/partials.h"

namespace flash_mla::mla_decode_sparse {

namespace {

using cpu::kBlockKeys;
using cpu::kTileRows;
using split_kv_combine::Partials;

int64_t num_tokens(const TokenSet& set, int64_t request) {
  if (set.topk_length == nullptr) return set.topk;
  return std::clamp<int64_t>(set.topk_length[request * set.topk_length_stride], 0, set.topk);
}

int64_t num_tokens(const Params& p, int64_t request) {
  return num_tokens(p.main, request) + num_tokens(p.extra, request);
}

int64_t num_tiles(const Params& p) { return ceil_div(p.h_q, kTileRows); }

SplitPlan plan(const Params& p) {
  return plan_splits(p.b * p.s_q * num_tiles(p), num_threads(), p.main.topk + p.extra.topk,
                     p.batch_invariant);
}

Partials partials(const Params& p, void* scratch) {
  return {p.b * p.s_q * p.h_q, plan(p).max_splits, kLatentDim, static_cast<float*>(scratch)};
}

void write_result(const Params& p, int64_t request, int64_t i, int64_t head, const float* out,
                  float lse) {
  const float factor =
      p.attn_sink == nullptr ? 1.0f : sink_factor(lse, p.attn_sink[head * p.attn_sink_stride]);
  cpu::store_result(p, request, i, head, out, factor, lse);
}

void attend(const Params& p, int64_t query, int64_t tile, int64_t split, const SplitPlan& plan,
            const Partials& partials) {
  const int64_t request = query / p.s_q;
  const int64_t i = query % p.s_q;
  const int64_t tokens = num_tokens(p, request);
  const int64_t splits = plan.splits(tokens);
  if (split >= splits) return;
  const int64_t first_head = tile * kTileRows;
  const int count = static_cast<int>(std::min<int64_t>(kTileRows, p.h_q - first_head));

  cpu::QueryTile queries(count, p.d_qk, kLatentDim, p.softmax_scale);
  for (int r = 0; r < count; ++r) {
    cpu::load_query(p, request, i, first_head + r, queries.q(r));
  }

  const cpu::FloatBuffer k(int64_t{kBlockKeys} * p.d_qk);
  const int64_t main_tokens = num_tokens(p.main, request);
  const KeyRange range = plan.range(tokens, split);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockKeys) {
    const int64_t end = std::min(begin + kBlockKeys, range.end);
    int n = 0;
    for (int64_t j = begin; j < end; ++j) {
      const TokenSet& set = j < main_tokens ? p.main : p.extra;
      const int64_t entry = j < main_tokens ? j : j - main_tokens;
      const int64_t slot = set.indices[request * set.indices_stride_b + i * set.indices_stride_s +
                                       entry * set.indices_stride_k];
      if (!set.kv.has_slot(slot)) continue;
      cpu::load_token(set.kv, slot / set.kv.page_size, slot % set.kv.page_size, 0,
                      k + int64_t{n++} * p.d_qk);
    }
    int visible[kTileRows];
    std::fill_n(visible, count, n);
    queries.attend(k.get(), p.d_qk, k.get(), p.d_qk, n, visible);
  }
  queries.finish();

  for (int r = 0; r < count; ++r) {
    if (splits == 1) {
      write_result(p, request, i, first_head + r, queries.out(r), queries.lse(r));
    } else {
      const int64_t row = query * p.h_q + first_head + r;
      std::copy_n(queries.out(r), kLatentDim, partials.out(row, split));
      *partials.lse(row, split) = queries.lse(r);
    }
  }
}

WorkspaceSize workspace(const Problem& p) { return {partials(p, nullptr).bytes(), 0}; }

Status launch(const Problem& p, const Workspace& workspace, Stream) {
  const SplitPlan splits = plan(p);
  const Partials parts = partials(p, workspace.scratch);
  const int64_t tiles = num_tiles(p);
  parallel_for(p.b * p.s_q * tiles * splits.max_splits, [&](int64_t unit) {
    attend(p, unit / splits.max_splits / tiles, unit / splits.max_splits % tiles,
           unit % splits.max_splits, splits, parts);
  });
  if (splits.max_splits == 1) return {};
  parallel_for(p.b * p.s_q, [&](int64_t query) {
    const int64_t n = splits.splits(num_tokens(p, query / p.s_q));
    if (n == 1) return;
    for (int64_t head = 0; head < p.h_q; ++head) {
      float out[kLatentDim];
      const float lse = merge_row(parts, query * p.h_q + head, n, out);
      write_result(p, query / p.s_q, query % p.s_q, head, out, lse);
    }
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       workspace, launch};

}  // namespace flash_mla::mla_decode_sparse
