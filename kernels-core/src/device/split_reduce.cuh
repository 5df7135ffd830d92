// Merging the parts of rows whose keys were split over CTAs, inside the kernel that made them.
//
// A part is a tile of partial results in scratch. The CTAs that have a unit's parts meet at a
// counter; then each of them merges its share of the rows. None waits for another without end: a
// CTA that has waited long (the others may not be resident yet) says so and leaves its share to
// whoever arrives last. A share is merged by the same arithmetic, in the same order, whoever does
// it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cuda/atomic>
#include <limits>

#include "device/decode_schedule.cuh"
#include "device/online_softmax.h"
#include "device/sm80/exp2.cuh"
#include "device/sm80/pin.cuh"
#include "flash_mla/types.h"

namespace flash_mla {

inline constexpr int32_t kPartialCols = 512;  // d_v

// Where the columns of a row of partial results are. kFragments: the 16-byte chunk 4 b + q has
// columns 32 b + 8 j + 2 q + {0, 1} for j = 0..3, as a thread has them in four tiles of its
// accumulators.
enum class PartColumns { kInOrder, kFragments };

// Partial results in scratch: tiles of `rows` rows of 16-bit sums over the part's keys, then a
// header for each row. Rounding to 16 bits adds less than rounding P and the result does, and
// halves the traffic, which is most of what a split costs.
struct PartialTiles {
  // The maximum of a row's logits, in units of log2, and the softmax's sum, in two terms.
  struct alignas(16) Header {
    float max, sum_a, sum_b, unused;
  };

  uint8_t* data = nullptr;
  int32_t rows = 0;

  static constexpr int32_t kChunkBytes = 16;
  static constexpr int32_t kRowChunks = kPartialCols * 2 / kChunkBytes;
  static constexpr int32_t kRowBytes = kRowChunks * kChunkBytes;

  // Whether the sums are divided by the softmax's: float16 has not the range for them as they are.
  static constexpr bool normalised(DType type) { return type == DType::kFloat16; }

  static FLASH_MLA_HD constexpr int64_t tile_bytes(int64_t rows) {
    return rows * int64_t{kRowBytes + sizeof(Header)};
  }
  FLASH_MLA_HD uint8_t* row(int64_t tile, int32_t row) const {
    return data + tile * tile_bytes(rows) + row * kRowBytes;
  }
  FLASH_MLA_HD Header* header(int64_t tile, int32_t row) const {
    return reinterpret_cast<Header*>(this->row(tile, rows)) + row;
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
  const uint8_t* data;    // of part 0, if it lay where the others do
  uint32_t stride_bytes;  // of parts
  uint32_t first_bytes;   // that part 0 lies behind that place
  uint32_t rows;
  uint32_t num_parts;

  template <bool kFixed>
  static __device__ PartTiles of(const PartialTiles& tiles, const DecodeGrid& g,
                                 const WorkItem& item, int32_t member) {
    const auto tile_bytes = static_cast<uint32_t>(PartialTiles::tile_bytes(tiles.rows));
    PartTiles t;
    t.data = tiles.row(kFixed ? partial_tile(g, item, member, 0)
                              : int64_t{2} * (item.first_team * g.team + member),
                       0);
    t.stride_bytes = kFixed ? tile_bytes : 2 * g.team * tile_bytes;
    t.first_bytes = kFixed ? 0 : tile_bytes;
    t.rows = tiles.rows;
    t.num_parts = item.num_parts;
    return t;
  }
};

// Where CTAs meet, in the workspace's sync block: one for each CTA, used by the unit whose part 0
// the CTA has. All zero between launches.
struct Meeting {
  uint32_t arrived;  // low half: warps that have written what they have of a part; high half: CTAs
                     // that gave up waiting
  uint32_t left;     // CTAs that have seen the outcome
  uint32_t gave_up[2];  // of this CTA: in the unit of its first, and of its last, item
};

// Cycles that a CTA waits for the others: far longer than their finishing times differ.
inline constexpr int64_t kMeetingPatienceCycles = 1 << 18;

using DeviceCounter = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;

// Of one item whose unit is split: which meeting, and who comes.
struct SplitUnit {
  Meeting* meetings;  // of all CTAs
  int32_t first_cta;  // of part 0; part p's is first_cta + p * team
  int32_t team;
  int32_t part;
  int32_t num_parts;
  int32_t writers;  // warps that write a part: num_parts * writers < 2^16

  __device__ Meeting& meeting() const { return meetings[first_cta]; }
  __device__ uint32_t& gave_up(int32_t p) const {
    return meetings[first_cta + p * team].gave_up[p == 0 ? 1 : 0];
  }

  // By each of the writers, when it has written; all of them before any thread of the CTA waits.
  __device__ void arrive() const {
    __syncwarp();
    if (threadIdx.x % kLanes != 0) return;
    DeviceCounter(meeting().arrived).fetch_add(1, cuda::memory_order_release);
  }

  enum Outcome : uint32_t { kIncomplete, kComplete, kInherits };

  // By one thread. Complete: all parts are there to read, after a barrier, and this CTA merges its
  // share; it inherits those of absent CTAs if it is the first that did not give up. Incomplete: it
  // has given up, and leaves its share to the heir.
  __device__ Outcome wait() const {
    const uint32_t all = static_cast<uint32_t>(num_parts * writers);
    DeviceCounter arrived(meeting().arrived);
    const int64_t start = clock64();
    uint32_t seen = arrived.load(cuda::memory_order_acquire);
    while ((seen & 0xffffu) != all && clock64() - start < kMeetingPatienceCycles) {
      seen = arrived.load(cuda::memory_order_acquire);
    }
    if ((seen & 0xffffu) != all) {
      gave_up(part) = 1;
      seen = arrived.fetch_add(1u << 16, cuda::memory_order_acq_rel);
      if ((seen & 0xffffu) != all) return kIncomplete;
    }
    return seen >> 16 != 0 && first_present() ? kInherits : kComplete;
  }

  // The last to arrive never gives up, so there is one. A CTA that gave up just as the last one
  // arrived stays and may be counted as absent by others: then two CTAs write the same values.
  __device__ bool first_present() const {
    for (int32_t p = 0; p < part; ++p) {
      if (!has_given_up(p)) return false;
    }
    return true;
  }
  __device__ bool has_given_up(int32_t p) const {
    return *const_cast<volatile uint32_t*>(&gave_up(p)) != 0;
  }

  // When the CTA has read all that it needs of the meeting: how many left before. Whoever finds
  // that all others had cleans up. Each has what it read by then, so no order of other accesses is
  // needed.
  __device__ uint32_t leave() const {
    return DeviceCounter(meeting().left).fetch_add(1, cuda::memory_order_relaxed);
  }
  __device__ void clean_up(uint32_t left_before) const {
    if (left_before != static_cast<uint32_t>(num_parts) - 1) return;
    for (int32_t p = 0; p < num_parts; ++p) gave_up(p) = 0;
    meeting().arrived = 0;
    meeting().left = 0;
  }
};

// Two values in 16 bits, the first in the low half.
template <DType kType>
__device__ __forceinline__ uint32_t pack_out(float a, float b) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  if constexpr (kType == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}
template <DType kType>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (kType == DType::kBFloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

// Word j of lane i of four becomes word i of lane j.
__device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    const bool upper = threadIdx.x & d;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & d) != 0) continue;
      const uint32_t mine = upper ? words[i] : words[i + d];
      const uint32_t other = __shfl_xor_sync(kAllLanes, mine, d);
      words[i] = upper ? other : words[i];
      words[i + d] = upper ? words[i + d] : other;
    }
  }
}

// Eight lanes take a line of a tile, 128 bytes, from up to eight parts at a time; each of them
// works out the weight of one part.
inline constexpr uint32_t kOctet = 8;
inline constexpr uint32_t kRowLines = PartialTiles::kRowChunks / kOctet;

template <class Op>
__device__ __forceinline__ float reduce_octet(float value, const Op& op) {
#pragma unroll
  for (int d = 1; d < kOctet; d *= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, d));
  return value;
}

// The softmax of a row over parts. Each lane adds one of eight: returns what its part's
// exponentials are to be multiplied with; `rescale` is for those of earlier parts.
struct MergedSoftmax : SoftmaxRow {
  __device__ __forceinline__ float add(float part_max, float part_sum, float& rescale) {
    if (part_sum == 0.0f) part_max = -kInfinity;  // an empty part, or none
    const float old_max = max_log2;
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    max_log2 = fmaxf(old_max, reduce_octet(part_max, larger));
    rescale = sm80::exp2_approx(old_max - max_log2);
    const float factor = sm80::exp2_approx(part_max - max_log2);
    const auto plus = [](float a, float b) { return a + b; };
    sum = sum * rescale + reduce_octet(factor * part_sum, plus);
    return factor;
  }
};

inline constexpr MergedSoftmax kNothing = {{std::numeric_limits<float>::lowest(), 0.0f}};

// A thread in the merge of a share, which is lines [first, first + count) of a tile. Octets side by
// side take a line each, then the lines that far on. A thread loads eight chunks at once: of eight
// parts; or of four or two, of two or four lines of a row, where there are no more. Where there are
// octets to spare, `helpers` of them share the parts of one line, eight each in turn.
struct MergeThread {
  uint32_t lines;  // of an octet at once
  uint32_t first, count;
  uint32_t width, helpers;
  uint32_t line, helper, lane;  // the thread's, of those

  // What it loads next: of some line, from `part` on.
  const uint8_t* data_at;    // of the first part, if it lay where the others do
  const uint8_t* header_at;  // of the part that the lane works out the weight of
  uint32_t part;
  int32_t num_parts;  // from there; at most eight of them are taken
  float4 header;      // zero where there is no part
  uint4 data[kOctet];

  __device__ MergeThread(const PartTiles& tiles, uint32_t share, uint32_t num_shares,
                         uint32_t thread, uint32_t num_threads) {
    const uint32_t octets = num_threads / kOctet, octet = thread / kOctet;
    lines = tiles.num_parts <= 2 ? 4 : tiles.num_parts <= 4 ? 2 : 1;
    const uint32_t all = tiles.rows * kRowLines;
    const uint32_t most = ceil_div(all / lines, num_shares);  // times `lines`
    first = min(all, most * share * lines);
    count = min(all - first, most * lines);
    const uint32_t width_log2 = kLanes - __clz(min(octets, most) - 1);
    width = lines << width_log2;
    helpers = min(octets >> width_log2, ceil_div(tiles.num_parts, kOctet));
    line = (octet & ((1u << width_log2) - 1)) * lines;
    helper = octet >> width_log2;
    lane = thread % kOctet;
    seek(tiles, 0, 0);
  }

  // To the line `base` behind its first one, and the helper's parts from `batch` on.
  __device__ void seek(const PartTiles& tiles, uint32_t base, uint32_t batch) {
    const uint32_t at = first + base + line;
    part = batch + helper * kOctet;
    num_parts =
        helper < helpers && base + line < count ? static_cast<int32_t>(tiles.num_parts - part) : 0;
    const uint8_t* const tile = tiles.data + part * tiles.stride_bytes;
    data_at = tile + (at * kOctet + lane) * PartialTiles::kChunkBytes;
    header_at = tile + (part + lane == 0 ? tiles.first_bytes : lane * tiles.stride_bytes) +
                (tiles.rows * PartialTiles::kRowBytes +
                 at / kRowLines * static_cast<uint32_t>(sizeof(PartialTiles::Header)));
  }

  __device__ void load_header() {
    header = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (static_cast<int32_t>(lane) < num_parts) {
      header = __ldcg(reinterpret_cast<const float4*>(header_at));
    }
  }
  // Chunks [kFrom, kTo) of eight, of kLines lines.
  template <int kLines, int kFrom, int kTo>
  __device__ void load_data(const PartTiles& tiles) {
#pragma unroll
    for (int i = kFrom; i < kTo; ++i) {
      constexpr int kParts = static_cast<int>(kOctet) / kLines;
      const int of_line = i % kParts;
      data[i] = make_uint4(0, 0, 0, 0);
      const uint32_t behind =
          of_line == 0 && part == 0 ? tiles.first_bytes : of_line * tiles.stride_bytes;
      if (of_line < num_parts) {
        data[i] = __ldcg(reinterpret_cast<const uint4*>(
            data_at + behind + i / kParts * (kOctet * PartialTiles::kChunkBytes)));
      }
    }
  }
};

template <DType kType>
__device__ __forceinline__ void add_chunk(const uint4& chunk, float weight, float (&value)[8]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = unpack<kType>(words[k]);
    value[2 * k] += weight * pair.x;
    value[2 * k + 1] += weight * pair.y;
  }
}

// Where a row's results go; null for a row that there is not.
struct MergedRow {
  uint8_t* out = nullptr;
  float* lse = nullptr;
  const float* sink = nullptr;  // read where the output has kSinks; null: none

  // What a sink leaves of the row.
  template <bool kSinks>
  __device__ __forceinline__ float factor(const MergedSoftmax& softmax) const {
    if constexpr (!kSinks) return 1.0f;
    return sink == nullptr ? 1.0f : sink_factor(softmax.lse(), *sink);
  }
};

// Shared memory of merge() for tiles of `rows` rows.
constexpr int64_t merge_smem_bytes(int64_t num_threads, int64_t rows) {
  return num_threads * int64_t{sizeof(float2) + 2 * sizeof(float4)} +
         rows * int64_t{sizeof(MergedRow)};
}

// The thread's columns of a line, and the row's lse.
template <DType kType, PartColumns kColumns, bool kSinks>
__device__ __forceinline__ void store_merged(const MergedRow& to, uint32_t at, uint32_t lane,
                                             const MergedSoftmax& softmax, float factor,
                                             const float (&value)[8]) {
  float scale = softmax.empty() ? 0.0f : __fdividef(factor, softmax.sum);
  scale *= to.factor<kSinks>(softmax);
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    words[k] = pack_out<kType>(value[2 * k] * scale, value[2 * k + 1] * scale);
  }
  if constexpr (kColumns == PartColumns::kFragments) transpose(words);
  if (to.out == nullptr) return;
  reinterpret_cast<uint4*>(to.out)[at % kRowLines * kOctet + lane] =
      make_uint4(words[0], words[1], words[2], words[3]);
  if (at % kRowLines + lane == 0) *to.lse = softmax.lse();
}

// Few parts: kLines lines of a row at once.
template <DType kType, PartColumns kColumns, int kLines, bool kSinks>
__device__ __forceinline__ void merge_lines(const PartTiles& tiles, MergeThread& own,
                                            const MergedRow* rows, float result_factor) {
  constexpr int kParts = static_cast<int>(kOctet) / kLines;
  const uint32_t first_row = own.first / kRowLines;
#pragma unroll 1
  for (uint32_t base = 0; base < own.count;) {
    const uint32_t line = base + own.line, at = own.first + line;
    base += own.width;
    const bool more = base < own.count;
    MergedSoftmax softmax = kNothing;
    const float part_sum = own.header.y + own.header.z;
    float rescale, weight = softmax.add(own.header.x, part_sum, rescale);
    if (PartialTiles::normalised(kType)) weight *= part_sum;
    float value[kLines][8] = {};
#pragma unroll
    for (int i = 0; i < static_cast<int>(kOctet); ++i) {
      add_chunk<kType>(own.data[i], __shfl_sync(kAllLanes, weight, i % kParts, kOctet),
                       value[i / kParts]);
    }
    if (more) {
      own.seek(tiles, base, 0);
      own.load_header();
      own.load_data<kLines, 0, 8>(tiles);
    }
    MergedRow to;
    if (own.helper == 0 && line < own.count) to = rows[at / kRowLines - first_row];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      store_merged<kType, kColumns, kSinks>(to, at + i, own.lane, softmax, result_factor, value[i]);
    }
  }
}

// Merges a share: all loads of a thread's first eight chunks are under way at once, and while it
// adds up what they bring, those of the next eight. Output: row(row) is a MergedRow, factor() one
// of all results. Called by kThreads threads, which barrier() synchronises, after load_header().
template <DType kType, PartColumns kColumns, int kThreads, class Output, class Barrier>
__device__ __forceinline__ void merge(const PartTiles& tiles, MergeThread& own, uint32_t thread,
                                      void* smem, const Output& output, const Barrier& barrier) {
  const uint32_t first_row = own.first / kRowLines;
  // Of helpers: a maximum and, relative to it, the softmax's sum and eight values.
  float2* const sums = static_cast<float2*>(smem);
  float4* const values = reinterpret_cast<float4*>(sums + kThreads);
  MergedRow* const rows = reinterpret_cast<MergedRow*>(values + 2 * kThreads);

  if (own.lines == 4) {
    own.load_data<4, 0, 8>(tiles);
  } else if (own.lines == 2) {
    own.load_data<2, 0, 8>(tiles);
  } else {
    own.load_data<1, 0, 8>(tiles);
  }
  // The last threads have least to do where the share is small.
  const uint32_t row = kThreads - 1 - thread;
  if (first_row + row <= (own.first + own.count - 1) / kRowLines) {
    rows[row] = output.row(first_row + row);
  }
  const float result_factor = output.factor();
  barrier();
  if (own.lines == 4)
    return merge_lines<kType, kColumns, 4, Output::kSinks>(tiles, own, rows, result_factor);
  if (own.lines == 2)
    return merge_lines<kType, kColumns, 2, Output::kSinks>(tiles, own, rows, result_factor);

  MergedSoftmax softmax = kNothing;
  float value[8] = {}, rescale;
  uint32_t base = 0, batch = 0;  // of all threads alike
#pragma unroll 1
  while (base < own.count) {
    const uint32_t line = base + own.line, at = own.first + line;
    batch += own.helpers * kOctet;
    const bool line_done = batch >= tiles.num_parts;
    if (line_done) {
      batch = 0;
      base += own.width;
    }
    const bool more = base < own.count;
    if (more) own.seek(tiles, base, batch);

    const float part_sum = own.header.y + own.header.z;
    float weight = softmax.add(own.header.x, part_sum, rescale);
    if (PartialTiles::normalised(kType)) weight *= part_sum;
    if (more) own.load_header();
#pragma unroll
    for (float& v : value) v *= rescale;
    const auto add = [&](int i) {
      add_chunk<kType>(own.data[i], __shfl_sync(kAllLanes, weight, i, kOctet), value);
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) add(i);
    if (more) own.load_data<1, 0, 4>(tiles);
#pragma unroll
    for (int i = 4; i < 8; ++i) add(i);
    if (more) own.load_data<1, 4, 8>(tiles);

    if (line_done && own.helpers == 1) {
      MergedRow to;
      if (own.helper == 0 && line < own.count) to = rows[at / kRowLines - first_row];
      store_merged<kType, kColumns, Output::kSinks>(to, at, own.lane, softmax, result_factor,
                                                    value);
      softmax = kNothing;
#pragma unroll
      for (float& v : value) v = 0.0f;
    }
  }
  if (own.helpers == 1) return;

  // The helpers of a line take a word of each lane's four, in turn, and merge what they all have.
  sums[thread] = make_float2(softmax.max_log2, softmax.sum);
  values[thread] = make_float4(value[0], value[1], value[2], value[3]);
  values[thread + kThreads] = make_float4(value[4], value[5], value[6], value[7]);
  barrier();
  const uint32_t stride = own.width * kOctet;  // of helpers
  const uint32_t column = own.line * kOctet + own.lane;
#pragma unroll 1
  for (uint32_t k = own.helper; k - own.helper < 4; k += own.helpers) {
    const float2* next =
        reinterpret_cast<const float2*>(values + k / 2 % 2 * kThreads + column) + k % 2;
    MergedSoftmax total = kNothing;
    float2 result = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (uint32_t first = 0; first < own.helpers; first += kOctet) {
      float2 sum = make_float2(0.0f, 0.0f);
      if (first + own.lane < own.helpers) sum = sums[(first + own.lane) * stride + column];
      const float weight = total.add(sum.x, sum.y, rescale);
      result.x *= rescale;
      result.y *= rescale;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float w = __shfl_sync(kAllLanes, weight, i, kOctet);
        float2 pair = make_float2(0.0f, 0.0f);
        if (first + i < own.helpers) pair = *next;
        next += 2 * stride;
        result.x += w * pair.x;
        result.y += w * pair.y;
      }
    }
    if (own.helper >= own.helpers || k >= 4 || own.line >= own.count) continue;
    const uint32_t at = own.first + own.line;
    const MergedRow to = rows[at / kRowLines - first_row];
    if (to.out == nullptr) continue;
    float scale = total.empty() ? 0.0f : __fdividef(result_factor, total.sum);
    scale *= to.factor<Output::kSinks>(total);
    const uint32_t in_line = kColumns == PartColumns::kInOrder
                                 ? own.lane * 4 + k
                                 : own.lane / 4 * 16 + k * 4 + own.lane % 4;
    const uint32_t word = at % kRowLines * (kOctet * 4) + in_line;
    reinterpret_cast<uint32_t*>(to.out)[word] = pack_out<kType>(result.x * scale, result.y * scale);
    if (word == 0) *to.lse = total.lse();
  }
}

}  // namespace flash_mla
