// mha_prefill_dense_backward on the CPU, in three passes:
//
//   delta    delta[i] = sum_c dO[i][c] O[i][c]
//   keys     one unit owns dK and dV of a block of keys, and sums over the queries that attend them
//   queries  one unit owns dQ of a tile of query rows, and sums over the keys that they attend
//
// with S = Q K^T, P = exp(scale S - lse), dP = dO V^T, dS = P (dP - delta); then dV = P^T dO,
// dK = scale dS^T Q, dQ = scale dS K. The last two passes both compute P and dS: for that, each
// gradient has one owner, which adds in a fixed order, and the result never depends on the threads:
// `deterministic` asks for nothing more.
#include <algorithm>

#include "device/cpu/attend.h"
#include "device/cpu/tile.h"
#include "device/cpu/token.h"
#include "device/mask.h"
#include "mha_prefill_dense/backward/problem.h"
#include "mha_prefill_dense/query_rows.h"
#include "runtime/threads.h"
#include "runtime/variant.h"

namespace flash_mla::mha_prefill_dense_backward {

namespace {

using cpu::FloatBuffer;
using cpu::kBlockKeys;
using cpu::kTileRows;
using cpu::Span;
using mha_prefill_dense::QueryRows;

// Queries that the keys' pass takes at a time: Q, dO, K, V, dK and dV of 64 rows, S and dP, 272 KB,
// stay in a second-level cache.
constexpr int kBlockQueries = 64;

struct Delta {
  float* data;  // [h_q, t_q]
  int64_t t_q;

  float& at(int64_t token, int64_t head) const { return data[head * t_q + token]; }
};

// A row without keys has an infinite lse: its P is 0, and whatever its q, dO and O hold stays out.
void compute_delta(const Params& p, const Delta& delta, int64_t token) {
  const FloatBuffer rows(int64_t{2} * p.d_v);
  for (int64_t head = 0; head < p.h_q; ++head) {
    if (is_empty_lse(p.lse.at(token, head))) {
      delta.at(token, head) = 0.0f;
      continue;
    }
    cpu::load_row(p.dtype, p.grad_out.row(token, head), p.d_v, rows.get());
    cpu::load_row(p.dtype, p.out.row(token, head), p.d_v, rows + p.d_v);
    cpu::ops().dot_rows(rows.get(), p.d_v, 1, rows + p.d_v, p.d_v, 1, p.d_v, &delta.at(token, head),
                        1);
  }
}

// Rows of a block of keys, or zeros to sum into.
struct KeyBlock {
  FloatBuffer k;  // [kBlockKeys, d_qk]
  FloatBuffer v;  // [kBlockKeys, d_v]

  explicit KeyBlock(const Params& p)
      : k(int64_t{kBlockKeys} * p.d_qk), v(int64_t{kBlockKeys} * p.d_v) {}

  void load(const Params& p, int64_t first_token, int n, int64_t kv_head) {
    for (int j = 0; j < n; ++j) {
      cpu::load_row(p.dtype, p.k.row(first_token + j, kv_head), p.d_qk, k + int64_t{j} * p.d_qk);
      cpu::load_row(p.dtype, p.v.row(first_token + j, kv_head), p.d_v, v + int64_t{j} * p.d_v);
    }
  }
  void set_zero(const Params& p) {
    std::fill_n(k.get(), int64_t{kBlockKeys} * p.d_qk, 0.0f);
    std::fill_n(v.get(), int64_t{kBlockKeys} * p.d_v, 0.0f);
  }
};

// Rows of queries, and what turns their logits into dS.
struct QueryBlock {
  FloatBuffer q;      // [rows, d_qk]
  FloatBuffer d_out;  // [rows, d_v]
  float lse_log2[kBlockQueries];
  float delta[kBlockQueries];

  QueryBlock(const Params& p, int rows) : q(int64_t{rows} * p.d_qk), d_out(int64_t{rows} * p.d_v) {}

  void load(const Params& p, const Delta& deltas, int r, int64_t token, int64_t head) {
    lse_log2[r] = p.lse.at(token, head) * kLog2e;
    delta[r] = deltas.at(token, head);
    float* to_q = q + int64_t{r} * p.d_qk;
    float* to_d_out = d_out + int64_t{r} * p.d_v;
    if (is_empty_lse(lse_log2[r])) {
      lse_log2[r] = kInfinity;
      std::fill_n(to_q, p.d_qk, 0.0f);
      std::fill_n(to_d_out, p.d_v, 0.0f);
    } else {
      cpu::load_row(p.dtype, p.q.row(token, head), p.d_qk, to_q);
      cpu::load_row(p.dtype, p.grad_out.row(token, head), p.d_v, to_d_out);
    }
  }
};

void key_gradients(const Params& p, const Delta& delta, int64_t sequence, int64_t kv_head,
                   int64_t tile) {
  const cpu::Ops& op = cpu::ops();
  const int64_t len_q = p.seqlens_q.length(sequence);
  const int64_t len_k = p.seqlens_kv.length(sequence);
  const int64_t first_q = p.seqlens_q.begin(sequence);
  const int64_t first_key = tile * kBlockKeys;
  const int keys = static_cast<int>(std::min<int64_t>(kBlockKeys, len_k - first_key));
  if (keys <= 0) return;

  KeyBlock block(p);
  KeyBlock sum(p);
  block.load(p, p.seqlens_kv.begin(sequence) + first_key, keys, kv_head);
  sum.set_zero(p);
  QueryBlock queries(p, kBlockQueries);
  // Transposed, a key a row: S becomes P, dP becomes dS.
  const FloatBuffer s(int64_t{kBlockKeys} * kBlockQueries);
  const FloatBuffer ds(int64_t{kBlockKeys} * kBlockQueries);
  const float scale_log2 = p.softmax_scale * kLog2e;

  const int64_t group = p.h_q / p.h_kv;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t begin = first_query(len_k, len_q, first_key, p.causal); begin < len_q;
         begin += kBlockQueries) {
      const int n = static_cast<int>(std::min<int64_t>(kBlockQueries, len_q - begin));
      for (int i = 0; i < n; ++i) queries.load(p, delta, i, first_q + begin + i, head);
      op.dot_rows(block.k.get(), p.d_qk, keys, queries.q.get(), p.d_qk, n, p.d_qk, s.get(),
                  kBlockQueries);
      op.dot_rows(block.v.get(), p.d_v, keys, queries.d_out.get(), p.d_v, n, p.d_v, ds.get(),
                  kBlockQueries);
      Span spans[kBlockKeys];  // the queries that attend a key
      for (int j = 0; j < keys; ++j) {
        const int64_t first = first_query(len_k, len_q, first_key + j, p.causal) - begin;
        const int32_t seen_from = static_cast<int32_t>(std::clamp<int64_t>(first, 0, n));
        spans[j] = {seen_from, n};
        float* s_row = s + int64_t{j} * kBlockQueries;
        float* ds_row = ds + int64_t{j} * kBlockQueries;
        for (int i = seen_from; i < n; ++i) s_row[i] = s_row[i] * scale_log2 - queries.lse_log2[i];
        op.exp2_row(s_row + seen_from, n - seen_from, 1.0f, 0.0f);
        for (int i = seen_from; i < n; ++i) ds_row[i] = s_row[i] * (ds_row[i] - queries.delta[i]);
      }
      op.accumulate(s.get(), kBlockQueries, spans, keys, queries.d_out.get(), p.d_v, p.d_v,
                    sum.v.get(), p.d_v);
      op.accumulate(ds.get(), kBlockQueries, spans, keys, queries.q.get(), p.d_qk, p.d_qk,
                    sum.k.get(), p.d_qk);
    }
  }

  for (int j = 0; j < keys; ++j) {
    const int64_t token = p.seqlens_kv.begin(sequence) + first_key + j;
    cpu::store_row(p.dtype, sum.k + int64_t{j} * p.d_qk, p.d_qk, p.softmax_scale,
                   p.grad_k.row(token, kv_head));
    cpu::store_row(p.dtype, sum.v + int64_t{j} * p.d_v, p.d_v, 1.0f, p.grad_v.row(token, kv_head));
  }
}

void query_gradients(const Params& p, const Delta& delta, int64_t sequence, int64_t kv_head,
                     int64_t tile) {
  const cpu::Ops& op = cpu::ops();
  const QueryRows rows(p, sequence, kv_head, tile);
  const int count = rows.count();
  if (count == 0) return;
  QueryBlock queries(p, count);
  for (int r = 0; r < count; ++r) queries.load(p, delta, r, rows.token(r), rows.head(r));

  KeyBlock block(p);
  const FloatBuffer s(int64_t{kTileRows} * kBlockKeys);   // then P
  const FloatBuffer ds(int64_t{kTileRows} * kBlockKeys);  // dP, then dS
  const FloatBuffer sum(int64_t{count} * p.d_qk);
  std::fill_n(sum.get(), int64_t{count} * p.d_qk, 0.0f);
  const float scale_log2 = p.softmax_scale * kLog2e;

  const int64_t keys = rows.keys(count - 1);
  for (int64_t begin = 0; begin < keys; begin += kBlockKeys) {
    const int n = static_cast<int>(std::min<int64_t>(kBlockKeys, keys - begin));
    block.load(p, p.seqlens_kv.begin(sequence) + begin, n, kv_head);
    op.dot_rows(queries.q.get(), p.d_qk, count, block.k.get(), p.d_qk, n, p.d_qk, s.get(),
                kBlockKeys);
    op.dot_rows(queries.d_out.get(), p.d_v, count, block.v.get(), p.d_v, n, p.d_v, ds.get(),
                kBlockKeys);
    Span spans[kTileRows];
    for (int r = 0; r < count; ++r) {
      const bool empty = queries.lse_log2[r] == kInfinity;
      const int visible = empty ? 0 : rows.visible(r, begin, n);
      spans[r] = {0, visible};
      float* s_row = s + int64_t{r} * kBlockKeys;
      float* ds_row = ds + int64_t{r} * kBlockKeys;
      op.exp2_row(s_row, visible, scale_log2, queries.lse_log2[r]);
      for (int j = 0; j < visible; ++j) ds_row[j] = s_row[j] * (ds_row[j] - queries.delta[r]);
    }
    op.accumulate(ds.get(), kBlockKeys, spans, count, block.k.get(), p.d_qk, p.d_qk, sum.get(),
                  p.d_qk);
  }

  for (int r = 0; r < count; ++r) {
    cpu::store_row(p.dtype, sum + int64_t{r} * p.d_qk, p.d_qk, p.softmax_scale,
                   p.grad_q.row(rows.token(r), rows.head(r)));
  }
}

WorkspaceSize workspace(const Problem& p) {
  return {p.seqlens_q.tokens * p.h_q * int64_t{sizeof(float)}, 0};
}

Status launch(const Problem& p, const Workspace& workspace, Stream) {
  const Delta delta = {static_cast<float*>(workspace.scratch), p.seqlens_q.tokens};
  parallel_for(p.seqlens_q.tokens, [&](int64_t token) { compute_delta(p, delta, token); });

  const int64_t key_tiles = ceil_div(p.seqlens_kv.max_seqlen, kBlockKeys);
  parallel_for(p.n * p.h_kv * key_tiles, [&](int64_t unit) {
    key_gradients(p, delta, unit / key_tiles / p.h_kv, unit / key_tiles % p.h_kv, unit % key_tiles);
  });

  const int64_t query_tiles = QueryRows::tiles(p);
  parallel_for(p.n * p.h_kv * query_tiles, [&](int64_t unit) {
    const int64_t tile = query_tiles - 1 - unit % query_tiles;  // the most keys first
    query_gradients(p, delta, unit / query_tiles / p.h_kv, unit / query_tiles % p.h_kv, tile);
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       workspace, launch};

}  // namespace flash_mla::mha_prefill_dense_backward
