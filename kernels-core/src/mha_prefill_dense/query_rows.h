// A CPU backend's tile of query rows: what a sequence's queries and the heads that share a key head
// are cut into.
#pragma once

#include "device/cpu/attend.h"
#include "device/mask.h"
#include "mha_prefill_dense/problem.h"

namespace flash_mla::mha_prefill_dense {

// The rows of a sequence and key head are (query i, head of the group), i slowest: the heads of a
// group read each block of keys once, and see the same of them.
class QueryRows {
 public:
  QueryRows(const Params& p, int64_t sequence, int64_t kv_head, int64_t tile)
      : group_(p.h_q / p.h_kv),
        first_row_(tile * cpu::kTileRows),
        first_token_(p.seqlens_q.begin(sequence)),
        first_head_(kv_head * group_),
        len_q_(p.seqlens_q.length(sequence)),
        len_k_(p.seqlens_kv.length(sequence)),
        causal_(p.causal) {}

  static int64_t tiles(const Params& p) {
    return ceil_div(p.seqlens_q.max_seqlen * (p.h_q / p.h_kv), cpu::kTileRows);
  }

  // Zero for a tile past the sequence's end.
  int count() const {
    return static_cast<int>(max_of(0, min_of(cpu::kTileRows, len_q_ * group_ - first_row_)));
  }
  int64_t token(int r) const { return first_token_ + query(r); }
  int64_t head(int r) const { return first_head_ + (first_row_ + r) % group_; }

  // Row r attends the sequence's first keys(r) keys; no row attends more than the last one.
  int64_t keys(int r) const { return visible_keys(len_k_, len_q_, query(r), causal_); }
  // Of a block of n keys that starts at key `begin`, row r attends the first visible(r, begin, n).
  int visible(int r, int64_t begin, int n) const {
    return static_cast<int>(max_of(0, min_of(n, keys(r) - begin)));
  }

 private:
  int64_t query(int r) const { return (first_row_ + r) / group_; }

  int64_t group_;
  int64_t first_row_;
  int64_t first_token_;
  int64_t first_head_;
  int64_t len_q_;
  int64_t len_k_;
  bool causal_;
};

}  // namespace flash_mla::mha_prefill_dense
