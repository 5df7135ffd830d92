// Merging the parts of rows whose keys were split over CTAs, inside the kernel that made them.
//
// A part is a tile of partial results in scratch: 16-bit, normalised, with the rows' lse. The CTAs
// that have a unit's parts meet at a counter; then each of them merges its share of the rows. None
// waits for another without end: a CTA that has waited long (the others may not be resident yet)
// says so and leaves its share to whoever arrives last. A merge is the same arithmetic, in the
// order of the parts, whoever does it.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cuda/atomic>

#include "device/decode_schedule.cuh"
#include "device/online_softmax.h"
#include "flash_mla/types.h"

namespace flash_mla {

inline constexpr int32_t kPartialCols = 512;  // d_v

// Partial results in scratch: tiles of `rows` rows. A row is a mean of V's rows, so that V's 16-bit
// type holds it; rounding it adds less than rounding P and the result does, and halves the traffic,
// which is most of what a split costs.
struct PartialTiles {
  uint8_t* data = nullptr;
  int32_t rows = 0;

  static constexpr int32_t kRowBytes = kPartialCols * 2;

  // The rows' lse are padded to whole 16 bytes: the next tile's rows are loaded as such.
  static FLASH_MLA_HD constexpr int64_t tile_bytes(int64_t rows) {
    return rows * kRowBytes + ceil_div(rows, 4) * int64_t{4 * sizeof(float)};
  }
  // 16-bit elements, row by row, then float32 lse of the rows.
  FLASH_MLA_HD uint8_t* out(int64_t tile) const { return data + tile * tile_bytes(rows); }
  FLASH_MLA_HD float* lse(int64_t tile) const {
    return reinterpret_cast<float*>(out(tile) + int64_t{rows} * kRowBytes);
  }
};

// Free splits: a CTA makes at most two partial tiles, the first and the last of its items, and what
// is cut in between belongs to one unit. Fixed splits: a place for each part of each unit.
FLASH_MLA_HD constexpr int64_t num_partial_tiles(const DecodeGrid& g) {
  if (g.invariant_splits == 0) return int64_t{2} * g.num_ctas();
  return g.invariant_splits == 1 ? 0 : g.num_units() * g.team * g.invariant_splits;
}
// The tile of part `part` of an item's unit, for CTA `member` of a team.
FLASH_MLA_HD constexpr int64_t partial_tile(const DecodeGrid& g, const WorkItem& item,
                                            int32_t member, int32_t part) {
  if (g.invariant_splits == 0) {
    return int64_t{2} * ((item.first_team + part) * g.team + member) + (part == 0 ? 1 : 0);
  }
  const int64_t unit = int64_t{item.request} * g.units_per_request + item.unit;
  return (unit * g.team + member) * g.invariant_splits + part;
}

// The partial tiles of an item's unit, for CTA `member` of a team, one for each part.
struct PartTiles {
  const uint8_t* first;
  const uint8_t* second;
  int64_t stride_bytes;  // from the second part on
  int32_t rows;
  int32_t num_parts;

  __device__ PartTiles(const PartialTiles& tiles, const DecodeGrid& g, const WorkItem& item,
                       int32_t member)
      : first(tiles.out(partial_tile(g, item, member, 0))),
        second(tiles.out(partial_tile(g, item, member, 1))),
        stride_bytes(tiles.out(partial_tile(g, item, member, 2)) - second),
        rows(tiles.rows),
        num_parts(item.num_parts) {}

  __device__ const uint8_t* out(int32_t part) const {
    return part == 0 ? first : second + (part - 1) * stride_bytes;
  }
  __device__ float lse(int32_t part, int32_t row) const {
    return __ldcg(reinterpret_cast<const float*>(out(part) + rows * PartialTiles::kRowBytes) + row);
  }
};

// Where CTAs meet, in the workspace's sync block: one for each CTA, used by the unit whose part 0
// the CTA has. All zero between launches.
struct Meeting {
  uint32_t arrived;  // low half: CTAs that have written their part; high half: that gave up waiting
  uint32_t left;     // CTAs that have seen the outcome
  uint32_t gave_up[2];  // of this CTA: in the unit of its first, and of its last, item
};

// Cycles that a CTA waits for the others: far longer than their finishing times differ.
inline constexpr int64_t kMeetingPatienceCycles = 1 << 18;

using DeviceCounter = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;

// Of one item whose unit is split: which meeting, and who comes. One thread of a CTA calls its
// functions.
struct SplitUnit {
  Meeting* meetings;  // of all CTAs
  int32_t first_cta;  // of part 0; part p's is first_cta + p * team
  int32_t team;
  int32_t part;
  int32_t num_parts;

  __device__ Meeting& meeting() const { return meetings[first_cta]; }
  __device__ uint32_t& gave_up(int32_t p) const {
    return meetings[first_cta + p * team].gave_up[p == 0 ? 1 : 0];
  }

  // After a barrier behind the CTA's writes of its part.
  __device__ void arrive() const {
    DeviceCounter(meeting().arrived).fetch_add(1, cuda::memory_order_release);
  }

  enum Outcome : uint32_t { kIncomplete, kComplete, kCompleteWithAbsent };

  // Complete: all parts are there to read, after a barrier; this CTA merges its share, and those of
  // absent CTAs if heir() says so. Incomplete: it has given up, and leaves its share to the heir.
  __device__ Outcome wait() const {
    const uint32_t all = static_cast<uint32_t>(num_parts);
    const auto outcome = [&](uint32_t counter) {
      return (counter & 0xffffu) != all ? kIncomplete
             : counter >> 16 == 0       ? kComplete
                                        : kCompleteWithAbsent;
    };
    DeviceCounter arrived(meeting().arrived);
    const int64_t start = clock64();
    do {
      const Outcome seen = outcome(arrived.load(cuda::memory_order_acquire));
      if (seen != kIncomplete) return seen;
    } while (clock64() - start < kMeetingPatienceCycles);
    gave_up(part) = 1;
    return outcome(arrived.fetch_add(1u << 16, cuda::memory_order_acq_rel));
  }

  // Whether this CTA merges the shares of those that gave up: the first that did not. The last to
  // arrive never gives up, so there is one. A CTA that gave up just as the last one arrived stays
  // and may be counted as absent by others: then two CTAs write the same values.
  __device__ bool heir() const {
    for (int32_t p = 0; p < part; ++p) {
      if (!has_given_up(p)) return false;
    }
    return true;
  }
  __device__ bool has_given_up(int32_t p) const {
    return *const_cast<volatile uint32_t*>(&gave_up(p)) != 0;
  }

  // When it has read all that it needs of the meeting. The last one cleans up. Each has what it
  // read by then, so no order of other accesses is needed.
  __device__ void leave() const {
    const uint32_t before = DeviceCounter(meeting().left).fetch_add(1, cuda::memory_order_relaxed);
    if (before != static_cast<uint32_t>(num_parts) - 1) return;
    for (int32_t p = 0; p < num_parts; ++p) gave_up(p) = 0;
    meeting().arrived = 0;
    meeting().left = 0;
  }
};

// Eight 16-bit values as floats.
template <DType kType>
__device__ __forceinline__ void unpack(const uint4& packed, float (&values)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == DType::kBFloat16) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

inline constexpr int32_t kSliceCols = kLanes * 8;  // 16 bytes a lane
inline constexpr int32_t kSlicesPerRow = kPartialCols / kSliceCols;
inline constexpr int32_t kSlicesAtOnce = 4;

// Shared memory of merge_share for `warps` warps, tiles of `rows` rows and `parts` parts.
constexpr int64_t merge_share_smem_bytes(int64_t warps, int64_t rows, int64_t parts) {
  return warps * kSlicesAtOnce * kSliceCols * int64_t{sizeof(float)} +
         rows * int64_t{sizeof(uint8_t*)} + (rows + 2 * parts) * int64_t{sizeof(float)};
}

// Adds up kSlices slices of this lane's eight columns over parts helper, helper + step, ...; kParts
// parts' loads are under way at once.
template <DType kType, int kSlices, int kParts>
__device__ __forceinline__ void sum_parts(const PartTiles& tiles, uint8_t* const* outs,
                                          const float* weights, int32_t helper, int32_t step,
                                          int32_t first, int32_t count, int32_t first_row,
                                          float (&sum)[kSlicesAtOnce][8]) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int32_t base = helper; base < tiles.num_parts; base += step * kParts) {
    uint4 packed[kParts][kSlices];
    float weight[kParts][kSlices];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int32_t p = base + k * step;
#pragma unroll
      for (int u = 0; u < kSlices; ++u) {
        const int32_t row = (first + u) / kSlicesPerRow - first_row;
        const bool used = p < tiles.num_parts && u < count && outs[row] != nullptr;
        weight[k][u] = used ? weights[row * tiles.num_parts + p] : 0.0f;
        packed[k][u] = make_uint4(0, 0, 0, 0);
        // Weight 0: an empty part, or one too small to count, or none, and nothing that was
        // written.
        if (weight[k][u] != 0.0f) {
          packed[k][u] = __ldcg(
              reinterpret_cast<const uint4*>(tiles.out(p) + (first + u) * (kSliceCols * 2)) + lane);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
#pragma unroll
      for (int u = 0; u < kSlices; ++u) {
        float values[8];
        unpack<kType>(packed[k][u], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[u][i] += weight[k][u] * values[i];
      }
    }
  }
}

// Merges share `share` of `num_shares` of a tile's rows, counted in slices of kSliceCols columns.
// out_row(row) gives where a row's result goes, null for a row that there is not; store(out,
// column, float4[2]) takes eight merged columns, store_lse(row, lse) a row's lse. Called by
// `kWarps` warps of which this is number `warp`; barrier() synchronises them. num_shares is
// num_parts, or a constant of 8 or more.
template <DType kType, int kWarps, class OutRow, class Store, class StoreLse, class Barrier>
__device__ __forceinline__ void merge_share(const PartTiles& tiles, int32_t share,
                                            int32_t num_shares, int warp, void* smem,
                                            const OutRow& out_row, const Store& store,
                                            const StoreLse& store_lse, const Barrier& barrier) {
  const int lane = threadIdx.x % kLanes;
  const int32_t num_parts = tiles.num_parts;
  const int32_t slices = tiles.rows * kSlicesPerRow;
  const int32_t first = slices * share / num_shares;
  const int32_t count = slices * (share + 1) / num_shares - first;
  const int32_t first_row = first / kSlicesPerRow;
  const int32_t num_rows = count == 0 ? 0 : (first + count - 1) / kSlicesPerRow - first_row + 1;

  float* exchange = static_cast<float*>(smem);  // [kWarps][kSlicesAtOnce][kSliceCols]
  uint8_t** outs =
      reinterpret_cast<uint8_t**>(exchange + kWarps * kSlicesAtOnce * kSliceCols);  // [num_rows]
  float* weights = reinterpret_cast<float*>(outs + tiles.rows);  // [num_rows][num_parts]

  // The parts' weights: a few lanes for each row.
  int32_t row_lanes = kLanes;
  while (row_lanes / 2 >= num_parts) row_lanes /= 2;
  const int32_t rows_at_once = kWarps * kLanes / row_lanes;
  const int32_t part_lane = lane % row_lanes;
#pragma unroll 1
  for (int32_t base = 0; base < num_rows; base += rows_at_once) {
    const int32_t i = base + (warp * kLanes + lane) / row_lanes;
    const int32_t row = first_row + min(i, num_rows - 1);
    uint8_t* const out = i < num_rows ? out_row(row) : nullptr;
    float* const row_weights = weights + (row - first_row) * num_parts;
    const int32_t end = out == nullptr ? 0 : num_parts;
    MergeRow merge;
#pragma unroll 1
    for (int32_t p = part_lane; p < end; p += row_lanes) {
      row_weights[p] = tiles.lse(p, row);
      merge.add_max(row_weights[p]);
    }
#pragma unroll 1
    for (int d = row_lanes / 2; d > 0; d /= 2) {
      merge.max = fmaxf(merge.max, __shfl_xor_sync(kAllLanes, merge.max, d));
    }
#pragma unroll 1
    for (int32_t p = part_lane; p < end; p += row_lanes) {
      row_weights[p] = merge.unscaled_weight(row_weights[p]);
      merge.sum += row_weights[p];
    }
#pragma unroll 1
    for (int d = row_lanes / 2; d > 0; d /= 2) {
      merge.sum += __shfl_xor_sync(kAllLanes, merge.sum, d);
    }
    const float scale = merge.empty() ? 0.0f : 1.0f / merge.sum;
#pragma unroll 1
    for (int32_t p = part_lane; p < end; p += row_lanes) row_weights[p] *= scale;
    if (part_lane == 0 && i < num_rows) {
      outs[i] = out;
      if (out != nullptr && (i > 0 || first % kSlicesPerRow == 0)) store_lse(row, merge.lse());
    }
  }
  barrier();

  // A warp sums four slices at a time: over all parts if they are few, else over every eighth or
  // so, and such warps meet in shared memory.
  int32_t part_warps = 1;
  while (part_warps < kWarps && part_warps * 4 < num_parts) part_warps *= 2;
  const int32_t helper = warp % part_warps;
  const int32_t group = warp / part_warps;
  const int32_t slices_at_once = kWarps / part_warps * kSlicesAtOnce;
#pragma unroll 1
  for (int32_t base = 0; base < count; base += slices_at_once) {
    const int32_t s = base + group * kSlicesAtOnce;
    float sum[kSlicesAtOnce][8] = {};
    if (s < count) {
      if (count == 1) {  // many parts of few rows
        sum_parts<kType, 1, 8>(tiles, outs, weights, helper, part_warps, first, 1, first_row, sum);
      } else {
        sum_parts<kType, kSlicesAtOnce, 2>(tiles, outs, weights, helper, part_warps, first + s,
                                           count - s, first_row, sum);
      }
    }
    if (part_warps > 1) {
#pragma unroll
      for (int u = 0; u < kSlicesAtOnce; ++u) {
        float4* const to = reinterpret_cast<float4*>(
            exchange + (warp * kSlicesAtOnce + u) * kSliceCols + lane * 8);
        to[0] = make_float4(sum[u][0], sum[u][1], sum[u][2], sum[u][3]);
        to[1] = make_float4(sum[u][4], sum[u][5], sum[u][6], sum[u][7]);
      }
      barrier();
      // Each of the group's warps adds up some of its slices.
      for (int32_t u = helper; u < kSlicesAtOnce && s + u < count; u += part_warps) {
        const float4* const from = reinterpret_cast<const float4*>(
            exchange + (group * part_warps * kSlicesAtOnce + u) * kSliceCols + lane * 8);
        float4 total[2] = {from[0], from[1]};
#pragma unroll 1
        for (int32_t w = 1; w < part_warps; ++w) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float4 other = from[w * kSlicesAtOnce * kSliceCols / 4 + h];
            total[h].x += other.x;
            total[h].y += other.y;
            total[h].z += other.z;
            total[h].w += other.w;
          }
        }
        const int32_t slice = first + s + u;
        uint8_t* const out = outs[slice / kSlicesPerRow - first_row];
        const int32_t column = slice % kSlicesPerRow * kSliceCols + lane * 8;
        if (out != nullptr) store(out, column, total);
      }
      barrier();
    } else {
#pragma unroll
      for (int u = 0; u < kSlicesAtOnce; ++u) {
        if (s + u >= count) break;
        const int32_t slice = first + s + u;
        uint8_t* const out = outs[slice / kSlicesPerRow - first_row];
        const int32_t column = slice % kSlicesPerRow * kSliceCols + lane * 8;
        const float4 total[2] = {make_float4(sum[u][0], sum[u][1], sum[u][2], sum[u][3]),
                                 make_float4(sum[u][4], sum[u][5], sum[u][6], sum[u][7])};
        if (out != nullptr) store(out, column, total);
      }
    }
  }
  barrier();  // whoever comes next may reuse the shared memory
}

}  // namespace flash_mla
