// mha_prefill_dense on the CPU. A unit of work is a tile of query rows of one sequence and key
// head.
#include <algorithm>

#include "device/cpu/attend.h"
#include "device/cpu/token.h"
#include "mha_prefill_dense/problem.h"
#include "mha_prefill_dense/query_rows.h"
#include "runtime/threads.h"
#include "runtime/variant.h"

namespace flash_mla::mha_prefill_dense {

namespace {

using cpu::kBlockKeys;
using cpu::kTileRows;

void attend(const Params& p, int64_t sequence, int64_t kv_head, int64_t tile) {
  const QueryRows rows(p, sequence, kv_head, tile);
  const int count = rows.count();
  if (count == 0) return;
  cpu::QueryTile queries(count, p.d_qk, p.d_v, p.softmax_scale);
  for (int r = 0; r < count; ++r) {
    cpu::load_row(p.dtype, p.q.row(rows.token(r), rows.head(r)), p.d_qk, queries.q(r));
  }

  const cpu::FloatBuffer k(int64_t{kBlockKeys} * p.d_qk);
  const cpu::FloatBuffer v(int64_t{kBlockKeys} * p.d_v);
  const int64_t first_key = p.seqlens_kv.begin(sequence);
  const int64_t keys = rows.keys(count - 1);
  for (int64_t begin = 0; begin < keys; begin += kBlockKeys) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockKeys, keys - begin));
    for (int j = 0; j < n; ++j) {
      const int64_t token = first_key + begin + j;
      cpu::load_row(p.dtype, p.k.row(token, kv_head), p.d_qk, k + int64_t{j} * p.d_qk);
      cpu::load_row(p.dtype, p.v.row(token, kv_head), p.d_v, v + int64_t{j} * p.d_v);
    }
    int visible[kTileRows];
    for (int r = 0; r < count; ++r) visible[r] = rows.visible(r, begin, n);
    queries.attend(k.get(), p.d_qk, v.get(), p.d_v, n, visible);
  }
  queries.finish();

  for (int r = 0; r < count; ++r) {
    const int64_t token = rows.token(r);
    const int64_t head = rows.head(r);
    cpu::store_row(p.dtype, queries.out(r), p.d_v, 1.0f, p.out.row(token, head));
    p.lse.at(token, head) = queries.lse(r);
  }
}

Status launch(const Problem& p, const Workspace&, Stream) {
  const int64_t tiles = QueryRows::tiles(p);
  parallel_for(p.n * p.h_kv * tiles, [&](int64_t unit) {
    // A causal sequence's last tile has the most keys: started first, it is not waited for.
    const int64_t tile = tiles - 1 - unit % tiles;
    attend(p, unit / tiles / p.h_kv, unit / tiles % p.h_kv, tile);
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       no_workspace<Problem>, launch};

}  // namespace flash_mla::mha_prefill_dense
