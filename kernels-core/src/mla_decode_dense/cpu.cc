// mla_decode_dense on the CPU. A unit of work is a tile of query rows of one request and key head,
// over one split of the request's keys; a second pass merges the splits.
#include <algorithm>

#include "device/cpu/attend.h"
#include "device/cpu/token.h"
#include "device/mask.h"
#include "device/scheduler.h"
#include "mla_decode_dense/problem.h"
#include "runtime/threads.h"
#include "runtime/variant.h"
#include "split_kv_combine/partials.h"

namespace flash_mla::mla_decode_dense {

namespace {

using cpu::kBlockKeys;
using cpu::kTileRows;
using split_kv_combine::Partials;

// The rows of a request and key head are (query i, head of the group), i slowest.
struct Rows {
  int64_t group;     // query heads of a key head
  int64_t per_head;  // s_q * group
  int64_t tiles;

  explicit Rows(const Params& p)
      : group(p.h_q / p.kv.h_kv), per_head(p.s_q * group), tiles(ceil_div(per_head, kTileRows)) {}
};

int64_t max_keys(const Params& p) { return p.max_pages * p.kv.page_size; }

// Keys that block_table has a page for; cache_seqlens beyond it are masked.
int64_t num_keys(const Params& p, int64_t request) {
  const int64_t length = p.cache_seqlens[request * p.cache_seqlens_stride];
  return std::clamp<int64_t>(length, 0, max_keys(p));
}

SplitPlan plan(const Params& p) {
  return plan_splits(p.b * p.kv.h_kv * Rows(p).tiles, num_threads(), max_keys(p),
                     p.batch_invariant);
}

Partials partials(const Params& p, void* scratch) {
  return {p.b * p.h_q * p.s_q, plan(p).max_splits, kLatentDim, static_cast<float*>(scratch)};
}

int64_t row_index(const Params& p, int64_t request, int64_t head, int64_t i) {
  return (request * p.h_q + head) * p.s_q + i;
}

float descale(const float* scales, int64_t stride, int64_t request) {
  return scales == nullptr ? 1.0f : scales[request * stride];
}

void write_result(const Params& p, int64_t request, int64_t head, int64_t i, const float* out,
                  float lse) {
  const float factor = descale(p.descale_k, p.descale_k_stride, request);
  cpu::store_result(p, request, i, head, out, factor, lse);
}

void attend(const Params& p, int64_t request, int32_t kv_head, int64_t tile, int64_t split,
            const SplitPlan& plan, const Partials& partials) {
  const int64_t keys = num_keys(p, request);
  const int64_t splits = plan.splits(keys);
  if (split >= splits) return;
  const Rows rows(p);
  const int64_t first_row = tile * kTileRows;
  const int count = static_cast<int>(std::min<int64_t>(kTileRows, rows.per_head - first_row));
  const int d_qk = p.kv.d_qk;

  cpu::QueryTile queries(count, d_qk, kLatentDim, p.softmax_scale);
  queries.set_logit_factor(descale(p.descale_q, p.descale_q_stride, request) *
                           descale(p.descale_k, p.descale_k_stride, request));
  int64_t visible_limit[kTileRows];
  for (int r = 0; r < count; ++r) {
    const int64_t i = (first_row + r) / rows.group;
    const int64_t head = kv_head * rows.group + (first_row + r) % rows.group;
    cpu::load_query(p, request, i, head, queries.q(r));
    visible_limit[r] = visible_keys<int64_t>(p.cache_seqlens[request * p.cache_seqlens_stride],
                                             p.s_q, i, p.causal);
  }

  // Tokens of pages that do not exist are left out of the block, so a row sees a prefix of it.
  const cpu::FloatBuffer k(int64_t{kBlockKeys} * d_qk);
  int64_t position[kBlockKeys];
  const KeyRange range = plan.range(keys, split);
  for (int64_t begin = range.begin; begin < range.end; begin += kBlockKeys) {
    const int64_t end = std::min(begin + kBlockKeys, range.end);
    int n = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t page = p.block_table[request * p.block_table_stride_b +
                                         j / p.kv.page_size * p.block_table_stride_p];
      if (!p.kv.has_page(page)) continue;
      cpu::load_token(p.kv, page, j % p.kv.page_size, kv_head, k + int64_t{n} * d_qk);
      position[n++] = j;
    }
    int visible[kTileRows];
    for (int r = 0; r < count; ++r) {
      visible[r] =
          static_cast<int>(std::lower_bound(position, position + n, visible_limit[r]) - position);
    }
    queries.attend(k.get(), d_qk, k.get(), d_qk, n, visible);
  }
  queries.finish();

  for (int r = 0; r < count; ++r) {
    const int64_t i = (first_row + r) / rows.group;
    const int64_t head = kv_head * rows.group + (first_row + r) % rows.group;
    if (splits == 1) {
      write_result(p, request, head, i, queries.out(r), queries.lse(r));
    } else {
      const int64_t row = row_index(p, request, head, i);
      std::copy_n(queries.out(r), kLatentDim, partials.out(row, split));
      *partials.lse(row, split) = queries.lse(r);
    }
  }
}

WorkspaceSize workspace(const Problem& p) { return {partials(p, nullptr).bytes(), 0}; }

Status launch(const Problem& p, const Workspace& workspace, Stream) {
  const SplitPlan splits = plan(p);
  const Partials parts = partials(p, workspace.scratch);
  const int64_t tiles = Rows(p).tiles;
  parallel_for(p.b * p.kv.h_kv * tiles * splits.max_splits, [&](int64_t unit) {
    const int64_t split = unit % splits.max_splits;
    const int64_t tile = unit / splits.max_splits % tiles;
    const int64_t kv_head = unit / splits.max_splits / tiles % p.kv.h_kv;
    const int64_t request = unit / splits.max_splits / tiles / p.kv.h_kv;
    attend(p, request, static_cast<int32_t>(kv_head), tile, split, splits, parts);
  });
  if (splits.max_splits == 1) return {};
  parallel_for(p.b * p.h_q, [&](int64_t unit) {
    const int64_t request = unit / p.h_q;
    const int64_t n = splits.splits(num_keys(p, request));
    if (n == 1) return;
    for (int64_t i = 0; i < p.s_q; ++i) {
      float out[kLatentDim];
      const float lse = merge_row(parts, unit * p.s_q + i, n, out);
      write_result(p, request, unit % p.h_q, i, out, lse);
    }
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       workspace, launch};

}  // namespace flash_mla::mla_decode_dense
