// The role of a consumer warpgroup: Q K^T, softmax and P V of every second tile; with 64 rows P V
// of all tiles for half of the columns. Transposed, so that N of the products is the number of
// rows.
//
//   S^T[64 keys][rows] = K Q^T         A: K;   B: Q, in shared memory
//   O^T[512 columns][rows] += V^T P^T  A: V^T; B: P, in shared memory
//
// 16-bit K and V are read from shared memory too: a thread has the keys, or columns, that wgmma's
// layout gives it. Codes become operands in registers, which leaves the choice of what a thread
// has. With warp w, g = lane / 4, t = lane % 4 (an operand's rows are g and g + 8 of the warp's 16,
// its depth 2 t, 2 t + 1, 2 t + 8, 2 t + 9):
//
// - K: keys 16 w + permuted(g) and 8 on; of a block of 64 columns 16 t to 16 t + 15, four
//   in each of four steps. Q's columns lie in the same order (load.cuh).
// - V: columns 64 w + 8 g to 8 g + 7 of 256, two in each of four products; of a step of 16 keys
//   those that P has at its depth.
// - O: these columns of query rows 8 j + 2 t and one on: 16 bytes of a result.
//
// Keys are permuted so that eight lanes that read 16 bytes each, or sixteen that read 8, meet all
// banks.
//
// The standing maximum of a row moves only when a logit exceeds it by kRescaleThresholdLog2. With
// 64 rows the warpgroups' turns are half a turn apart, as in the kernel for 16-bit caches.
#pragma once

#include "device/sm90/row_softmax.cuh"
#include "device/sm90/wgmma.cuh"
#include "mla_decode_dense/sm90/transposed/load.cuh"

namespace flash_mla::mla_decode_dense::sm90::transposed {

using flash_mla::sm90::Place;
using flash_mla::sm90::times;

// The key at place g of eight.
__device__ __forceinline__ constexpr int permuted(int g) { return g ^ (g % 2 * 4); }

template <class Cfg>
class Attend {
  using C = Config<Cfg>;
  using Operand = flash_mla::sm90::Operand;
  using Mma = flash_mla::sm90::Wgmma<C::kMmaType>;
  using RopeMma = flash_mla::sm90::Wgmma<DType::kBFloat16>;
  static constexpr int kN = C::kRows;
  static constexpr bool kShared = C::kShared;
  static constexpr int kHalfProducts = 4;  // of 64 columns of V, in half of them
  static constexpr int kProducts = kShared ? kHalfProducts : 2 * kHalfProducts;
  static constexpr int kSteps = kTileKeys / kDepth;
  // Codes: products are issued in groups, of which some are under way while the next is converted.
  // With more than 16 rows there are registers for little.
  static constexpr int kFlights = 2;
  static constexpr int kGroup = kN == 16 ? 2 : 1;                             // steps of Q K^T
  static constexpr int kColumnGroup = kN == 16 ? 2 : 1;                       // products of P V
  static constexpr bool kLoadsAhead = kN == 16 || (kN == 64 && !C::kScaled);  // of the next step
  static constexpr int kBlockSteps = kColumnsPerStep / kDepth;  // of Q K^T, for 64 columns

 public:
  float o[kProducts][kN / 2];
  // Of the warp's keys in the tiles that the warpgroup owns, for the rows of sum_row().
  static constexpr int kSums = flash_mla::sm90::kRowSums<kN>;
  float sum[kSums];

  __device__ __forceinline__ Attend(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                    int32_t member)
      : p_(p), smem_(smem), member_(member), wg_(wg) {}

  static __device__ __forceinline__ int sum_row(const Place& at, int i) {
    return flash_mla::sm90::sum_row<kN>(at, i);
  }

  // Attends the tiles of a pass. `first`: tiles before it, over all passes.
  __device__ __forceinline__ void pass(uint32_t index, uint32_t first) {
    slot_ = index % 2;
    const ItemSlot& slot = smem_.feed.slots[slot_];
    const int32_t tiles = uniform(slot.item.block_end - slot.item.block_begin);
    partial_from_ = uniform(slot.partial_from);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) o[i][k] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
    begin_rows();

    if constexpr (kShared) {
      shared_tiles(tiles, first);
    } else {
#pragma unroll 1
      for (int32_t tile = wg_; tile < tiles; tile += kConsumers) {
        query_keys(tile, first + tile);
        attend_own(tile, first + tile);
        values_keys(wg_, tile, first + tile);
      }
    }
    flash_mla::sm90::wgmma_wait<0>();
    pin_output();
  }

  // Where each warpgroup has all columns: the sum over both, in o[0] to o[3] for the half of the
  // columns that it stores. Sums of rows are in shared memory.
  __device__ __forceinline__ void add_up_output() {
    if constexpr (!kShared) {
      rescale_to_common_maximum();
#pragma unroll
      for (int first = 0; first < kHalfProducts; first += kExchanged) {
        if (first > 0) flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
        if (wg_ == 0) {
          send<1>(first);
        } else {
          send<0>(first);
        }
        flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
        if (wg_ == 0) {
          receive<0>(first);
        } else {
          receive<1>(first);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void shared_tiles(int32_t tiles, uint32_t first) {
    int32_t tile = wg_;
    if (tile == 0 && tile < tiles) {
      query_keys(0, first);
      attend_own(0, first);
      values_keys(wg_, 0, first);
      ++own_turn_;
      tile += kConsumers;
    }
#pragma unroll 1
    for (; tile < tiles; tile += kConsumers) {
      query_keys(tile, first + tile);
      attend_own(tile, first + tile);
      values_keys(wg_ ^ 1, tile - 1, first + tile - 1);
      ++other_turn_;
      values_keys(wg_, tile, first + tile);
      ++own_turn_;
    }
    if (tile == tiles && tiles > 0) {  // the other's last tile is the pass's last
      follow_sums();
      values_keys(wg_ ^ 1, tiles - 1, first + tiles - 1);
      ++other_turn_;
    }
  }

  // The warpgroups' maxima of a row, and sums up to it, become the same.
  __device__ __forceinline__ void rescale_to_common_maximum() {
    // All know the maxima by now, and nobody changes them before the next pass.
    flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
    const Place at;
    const auto factor = [&](int row) {
      const float own = smem_.rows[wg_][row].max, other = smem_.rows[wg_ ^ 1][row].max;
      return flash_mla::sm90::fast_exp2(own - fmaxf(own, other));
    };
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] *= factor(sum_row(at, i));
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      rescale_output(j, make_float2(factor(8 * j + 2 * at.t), factor(8 * j + 2 * at.t + 1)));
    }
  }
  // Products that are exchanged at once, from `first` on, by way of shared memory.
  static constexpr int kFloat4s = kN / 8;  // of a thread in a product
  static constexpr int kExchanged =
      kShared ? kHalfProducts
              : C::kExchangeBytes / static_cast<int>(kConsumerThreads * kFloat4s * sizeof(float4));
  static_assert(kHalfProducts % kExchanged == 0);
  template <int kHalf>
  __device__ __forceinline__ void send(int first) {
    float4* const to = smem_.exchange[kHalf] + static_cast<int32_t>(threadIdx.x) % kWarpgroup;
#pragma unroll
    for (int i = 0; i < kExchanged * kFloat4s; ++i) {
      const float* const from = o[kHalf * kHalfProducts + first + i / kFloat4s] + i % kFloat4s * 4;
      to[i * kWarpgroup] = make_float4(from[0], from[1], from[2], from[3]);
    }
  }
  template <int kHalf>
  __device__ __forceinline__ void receive(int first) {
    const float4* const from =
        smem_.exchange[kHalf] + static_cast<int32_t>(threadIdx.x) % kWarpgroup;
#pragma unroll
    for (int i = 0; i < kExchanged * kFloat4s; ++i) {
      const float4 other = from[i * kWarpgroup];
      const float* const own = o[kHalf * kHalfProducts + first + i / kFloat4s] + i % kFloat4s * 4;
      float* const to = o[first + i / kFloat4s] + i % kFloat4s * 4;
      to[0] = own[0] + other.x;
      to[1] = own[1] + other.y;
      to[2] = own[2] + other.z;
      to[3] = own[3] + other.w;
    }
  }

  __device__ __forceinline__ void sync_warpgroup() {
    flash_mla::sm90::named_barrier_sync(kWarpgroupSync + wg_, kWarpgroup);
  }
  __device__ __forceinline__ void pin_output() {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) flash_mla::sm90::pin(o[i]);
  }
  __device__ __forceinline__ void pin_logits() { flash_mla::sm90::pin(s_); }

  __device__ __forceinline__ void begin_rows() {
    // All have stored the last pass's rows; all see this one's.
    flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
    const int32_t row = static_cast<int32_t>(threadIdx.x);
    if (row < kN) {
      float factor;
      if constexpr (C::kCodes) {
        factor = smem_.query_factor[slot_][row];
      } else {  // look_at_keys() applies one that is not positive
        factor = slot().scale_log2 > 0.0f ? slot().scale_log2 : 1.0f;
      }
      for (auto& rows : smem_.rows) rows[row] = {kNoMaximum, factor};
      WorkItem item;
      item.unit = slot().item.unit;
      const TileRows rows(p_, item, member_, slot().length);
      smem_.visible[row] = rows.visible(p_, row) - slot().item.block_begin * kTileKeys;
    }
    flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
  }

  __device__ __forceinline__ void wait_for_tile(uint32_t tile, int piece = 0) {
    flash_mla::sm90::wait(smem_.kv_full[tile % C::kStages][piece], tile / C::kStages & 1);
  }
  // A thread's keys are this one of the tile and 8 on.
  static __device__ __forceinline__ int32_t first_key(const Place& at) {
    return 16 * at.warp + (C::kCodes ? permuted(at.g) : at.g);
  }

  // S^T = K Q^T of the own tile.
  __device__ __forceinline__ void query_keys(int32_t tile_in_pass, uint32_t tile) {
    if constexpr (C::kCodes) {
      wait_for_tile(tile);
      query_codes(tile_in_pass, tile);
    } else {
      const Operand k(smem_.k[tile % C::kStages], flash_mla::sm90::kKMajorLeading);
      const Operand q(smem_.q, flash_mla::sm90::kKMajorLeading);
#pragma unroll
      for (int c = 0; c < C::kColumnBlocks; ++c) {
        if (c % C::kPieceBlocks == 0) {
          wait_for_tile(tile, c / C::kPieceBlocks);
          flash_mla::sm90::wgmma_fence();
        }
#pragma unroll
        for (int step = 0; step < kBlockSteps; ++step) {
          const uint64_t a = k.at(c * C::kBlockBytes + step * 32);
          const uint64_t b = q.at(c * C::kQueryBlockBytes + step * 32);
          if (c == 0 && step == 0) {
            Mma::template product<false, kN, Mma::kKMajor>(s_, a, b);
          } else {
            Mma::template product<true, kN, Mma::kKMajor>(s_, a, b);
          }
        }
      }
      flash_mla::sm90::wgmma_commit();
    }
  }
  __device__ __forceinline__ void query_codes(int32_t tile_in_pass, uint32_t tile) {
    const Place at;
    const uint8_t* const k_tile = smem_.k[tile % C::kStages];
    // 16 codes of the thread's first key in a block's first 64 columns; the others are 64 bytes on,
    // before the swizzle.
    const int32_t key = first_key(at);
    const int32_t offset = key * kCodeBlock + ((at.t ^ permuted(at.g)) << 4);
    const int32_t rope_offset =
        C::kLatentBytes + (C::kRopeCodes ? key * 64 + ((at.t ^ permuted(at.g) / 2) << 4) : offset);
    if constexpr (C::kScaled) {
      read_exponent(at, 0, tile_in_pass, tile);
      read_exponent(at, 1, tile_in_pass, tile);
    }
    __half2 multiplier[2];
    constexpr int kBlocks = kLatentDim / kColumnsPerStep + (C::kRope ? 1 : 0);
    uint4 codes[2][2];  // of a block, for the thread's two keys
    const auto load_codes = [&](int c) {
      const bool rope = c == kLatentDim / kColumnsPerStep;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row =
            rope ? rope_offset + half * 8 * C::kRopeRowBytes
                 : (offset ^ c % 2 * 64) + c / 2 * (kTileKeys * kCodeBlock) + half * 8 * kCodeBlock;
        codes[c % 2][half] = *reinterpret_cast<const uint4*>(k_tile + row);
      }
    };
    uint32_t a[kFlights][kGroup][4];
#pragma unroll
    for (int c = 0; c < kBlocks; ++c) {
      const bool rope = c == kLatentDim / kColumnsPerStep;
      const Operand q(smem_.q + c * C::kQueryBlockBytes, flash_mla::sm90::kKMajorLeading);
      if constexpr (C::kScaled) {
        if (!rope && c % 2 == 0) {
          multiplier[0] = __float2half2_rn(unit_scale(at, 0, c / 2, tile));
          multiplier[1] = __float2half2_rn(unit_scale(at, 1, c / 2, tile));
        }
      }
      if (c == 0 || !kLoadsAhead) load_codes(c);
      if (kLoadsAhead && c + 1 < kBlocks) load_codes(c + 1);
      uint4(&raw)[2] = codes[c % 2];
#pragma unroll
      for (int first = 0; first < kBlockSteps; first += kGroup) {
        const int group = (c * kBlockSteps + first) / kGroup;
        uint32_t (&steps)[kGroup][4] = a[group % kFlights];
        // The products that read these registers last are done.
        if (group >= kFlights) flash_mla::sm90::wgmma_wait<kFlights - 1>();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            const int step = first + k;
            if (rope && C::kRopeBf16) {
              if (step == 2) {
                raw[half] = *reinterpret_cast<const uint4*>(k_tile + (rope_offset ^ 64) +
                                                            half * 8 * C::kRopeRowBytes);
              }
              // As for the codes, without the power of two that P carries.
              const __nv_bfloat162 unit = __float2bfloat162_rn(pow2(-exponent_[half]));
              steps[k][half] = times(step % 2 == 0 ? raw[half].x : raw[half].z, unit);
              steps[k][half + 2] = times(step % 2 == 0 ? raw[half].y : raw[half].w, unit);
              continue;
            }
            const uint32_t four = step == 0   ? raw[half].x
                                  : step == 1 ? raw[half].y
                                  : step == 2 ? raw[half].z
                                              : raw[half].w;
            uint32_t low, high;
            sm89::e4m3x4_to_halves(four, low, high);
            if constexpr (C::kScaled) {
              low = times(low, multiplier[half]);
              high = times(high, multiplier[half]);
            }
            steps[k][half] = low;
            steps[k][half + 2] = high;
          }
        }
        flash_mla::sm90::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kGroup; ++step) {
          const uint64_t b = q.at((first + step) * 32);
          if (group == 0 && step == 0) {
            Mma::template product<false, kN>(s_, steps[step], b);
          } else if (rope && C::kRopeBf16) {
            RopeMma::template product<true, kN>(s_, steps[step], b);
          } else {
            Mma::template product<true, kN>(s_, steps[step], b);
          }
        }
        flash_mla::sm90::wgmma_commit();
      }
    }
  }

  // v32_fp8: a token's scales are taken as fp16 multipliers up to 2 and a power of two for all
  // four, which P carries. What is smaller than 2^kLeastExponent times a code is 0, and so are the
  // codes of tokens past the keys.
  __device__ __forceinline__ const float* scales_of(const Place& at, int half,
                                                    uint32_t tile) const {
    return reinterpret_cast<const float*>(smem_.k[tile % C::kStages] + C::kLatentBytes +
                                          C::kRopeBytes) +
           (first_key(at) + 8 * half) * C::kScales;
  }
  __device__ __forceinline__ void read_exponent(const Place& at, int half, int32_t tile_in_pass,
                                                uint32_t tile) {
    const float4 v = *reinterpret_cast<const float4*>(scales_of(at, half, tile));
    const float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    const int32_t key = (slot().item.block_begin + tile_in_pass) * kTileKeys + first_key(at);
    exponent_[half] = key + 8 * half >= slot().num_keys ? kNoKey
                      : most > 0.0f && most < kInfinity ? max(floor_log2(most), kLeastExponent)
                                                        : 0;
  }
  __device__ __forceinline__ float unit_scale(const Place& at, int half, int i,
                                              uint32_t tile) const {
    return exponent_[half] == kNoKey ? 0.0f : scales_of(at, half, tile)[i] * pow2(-exponent_[half]);
  }
  // The tile's multipliers, for all who multiply it: a thread writes one of four for each of its
  // keys.
  __device__ __forceinline__ void write_multipliers(const Place& at, uint32_t tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      smem_.multiplier[wg_][at.t][first_key(at) + 8 * half] =
          __float2half_rn(unit_scale(at, half, at.t, tile));
    }
  }
  static constexpr int kLeastExponent = -64;
  static constexpr int kNoKey = kLeastExponent - 1;  // exponent_ of a token past the keys

  __device__ __forceinline__ RowState (&states() const)[kN] {
    return smem_.rows[kShared ? 0 : wg_];
  }

  // Whether a row's maximum grew in a turn of a warpgroup; turns are counted over all passes.
  __device__ __forceinline__ bool has_grown(int wg, uint32_t turn) const {
    return uniform(*static_cast<volatile uint32_t*>(&smem_.grown[wg][turn % 2])) != 0;
  }

  // The standing maxima of the other's tile are known: takes them over for the sums.
  __device__ __forceinline__ void follow_sums() {
    flash_mla::sm90::wait(smem_.max_full[wg_ ^ 1], other_turn_ % 2);
    if (has_grown(wg_ ^ 1, other_turn_)) rescale_sums(wg_ ^ 1, other_turn_);
  }
  __device__ __forceinline__ void rescale_sums(int wg, uint32_t turn) {
    const Place at;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] *= smem_.row_factor[wg][turn % 2][sum_row(at, i)];
  }
  __device__ __forceinline__ void rescale_output(int wg, uint32_t turn) {
    const Place at;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      rescale_output(
          j, *reinterpret_cast<const float2*>(&smem_.row_factor[wg][turn % 2][8 * j + 2 * at.t]));
    }
  }
  // Of rows 8 j + 2 t and one on.
  __device__ __forceinline__ void rescale_output(int j, float2 factor) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      o[i][4 * j] *= factor.x;
      o[i][4 * j + 1] *= factor.y;
      o[i][4 * j + 2] *= factor.x;
      o[i][4 * j + 3] *= factor.y;
    }
  }

  // O^T += V^T P^T of a tile whose P warpgroup `owner` has written.
  __device__ __forceinline__ void values_keys(int owner, int32_t tile_in_pass, uint32_t tile) {
    const uint32_t turn = owner == wg_ ? own_turn_ : other_turn_;
    if constexpr (kShared) wait_for_tile(tile);
    zero_tail(tile_in_pass, tile);
    if constexpr (kShared) {
      flash_mla::sm90::wait(smem_.p_full[owner], turn % 2);
      flash_mla::sm90::wgmma_wait<0>();
      pin_output();
      if (has_grown(owner, turn)) rescale_output(owner, turn);
    }
    pin_output();
    if constexpr (C::kCodes) {
      if constexpr (kShared) {
        values_codes(owner, tile, wg_, o);
      } else {
        values_codes(owner, tile, 0, reinterpret_cast<Half&>(o[0]));
        values_codes(owner, tile, 1, reinterpret_cast<Half&>(o[kHalfProducts]));
      }
      release(tile);  // its codes are in registers
      flash_mla::sm90::wgmma_wait<0>();
      pin_output();
    } else {
      flash_mla::sm90::wgmma_fence();
      const Operand p(smem_.p[owner], flash_mla::sm90::kKMajorLeading);
      // The K tile read along the keys: 8 more keys are 1 KB on, 64 more columns a block.
      const Operand v(smem_.k[tile % C::kStages], flash_mla::sm90::kKMajorLeading);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          Mma::template product<true, kN, Mma::kMnMajor>(
              o[i], v.at(i * C::kBlockBytes + step * kDepth * 128), p.at(step * 32));
        }
      }
      flash_mla::sm90::wgmma_commit();
      flash_mla::sm90::wgmma_wait<0>();
      pin_output();
      release(tile);
    }
    if (kShared && owner != wg_) {
      const Place at;
      if (at.lane == 0) flash_mla::sm90::arrive(smem_.p_empty[owner]);
      __syncwarp();
    }
  }
  // This warp has read all that it needs of the tile.
  __device__ __forceinline__ void release(uint32_t tile) {
    const Place at;
    __syncwarp();
    if (at.lane == 0) flash_mla::sm90::arrive(smem_.kv_empty[tile % C::kStages]);
    __syncwarp();
  }
  using Half = float[kHalfProducts][kN / 2];
  // For columns [256 half, 256 half + 256).
  __device__ __forceinline__ void values_codes(int owner, uint32_t tile, int columns_half,
                                               Half& o) {
    const Place at;
    // 8 codes of keys 2 t and 2 t + 1 of eight, among the warp's 64 columns, half a block.
    const int32_t chunk = at.warp % 2 * 4 + at.g / 2;
    const int32_t key[2] = {2 * at.t, permuted(2 * at.t + 1)};
    const uint8_t* const v = smem_.k[tile % C::kStages] +
                             (2 * columns_half + at.warp / 2) * (kTileKeys * kCodeBlock) +
                             at.g % 2 * 8;
    const int32_t offset[2] = {key[0] * kCodeBlock + ((chunk ^ key[0]) << 4),
                               key[1] * kCodeBlock + ((chunk ^ key[1]) << 4)};
    const Operand p(smem_.p[owner], flash_mla::sm90::kKMajorLeading);
    uint2 all_codes[2][2][2];
    __half2 multipliers[2][2];
    const auto load_step = [&](int step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t first = 16 * step + 8 * half;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          all_codes[step % 2][half][i] =
              *reinterpret_cast<const uint2*>(v + offset[i] + first * kCodeBlock);
        }
        if constexpr (C::kScaled) {
          const __half* const of = smem_.multiplier[owner][2 * columns_half + at.warp / 2] + first;
          multipliers[step % 2][half] = __halves2half2(of[key[0]], of[key[1]]);
        }
      }
    };
    uint32_t a[kFlights][kColumnGroup][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == 0 || !kLoadsAhead) load_step(step);
      if (kLoadsAhead && step + 1 < kSteps) load_step(step + 1);
      uint2(&codes)[2][2] = all_codes[step % 2];
      __half2(&multiplier)[2] = multipliers[step % 2];
#pragma unroll
      for (int first = 0; first < kHalfProducts; first += kColumnGroup) {
        const int group = (step * kHalfProducts + first) / kColumnGroup;
        uint32_t (&columns)[kColumnGroup][4] = a[group % kFlights];
        if (group >= kFlights) flash_mla::sm90::wgmma_wait<kFlights - 1>();
#pragma unroll
        for (int i = 0; i < kColumnGroup; ++i) {  // two columns of this thread
          const int product = first + i;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t x = product < 2 ? codes[half][0].x : codes[half][0].y;
            const uint32_t y = product < 2 ? codes[half][1].x : codes[half][1].y;
            const uint32_t pairs = __byte_perm(x, y, product % 2 == 0 ? 0x5140 : 0x7362);
            uint32_t low, high;
            sm89::e4m3x4_to_halves(pairs, low, high);
            if constexpr (C::kScaled) {
              low = times(low, multiplier[half]);
              high = times(high, multiplier[half]);
            }
            columns[i][2 * half] = low;
            columns[i][2 * half + 1] = high;
          }
        }
        flash_mla::sm90::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kColumnGroup; ++i) {
          Mma::template product<true, kN>(o[first + i], columns[i], p.at(step * 32));
        }
        flash_mla::sm90::wgmma_commit();
      }
    }
  }

  __device__ __forceinline__ const volatile ItemSlot& slot() const {
    return smem_.feed.slots[slot_];
  }

  // Keys past the cache's end: their P is 0, but their values may be NaN. Each warpgroup clears
  // what it multiplies.
  __device__ __forceinline__ void zero_tail(int32_t tile_in_pass, uint32_t tile) {
    if (tile_in_pass < partial_from_) return;
    const int32_t valid =
        uniform(slot().num_keys - (slot().item.block_begin + tile_in_pass) * kTileKeys);
    if (valid >= kTileKeys) return;
    constexpr int kBlocks = C::kLatentBytes / C::kBlockBytes / (kShared ? kConsumers : 1);
    uint8_t* const first =
        smem_.k[tile % C::kStages] + (kShared ? kBlocks * wg_ * C::kBlockBytes : 0);
#pragma unroll 1
    for (int32_t i = threadIdx.x % kWarpgroup; i < (kTileKeys - valid) * kBlocks * 8;
         i += kWarpgroup) {
      const int32_t key = valid + i / 8 / kBlocks;
      *reinterpret_cast<uint4*>(first + i / 8 % kBlocks * C::kBlockBytes + key * 128 + i % 8 * 16) =
          make_uint4(0, 0, 0, 0);
    }
    flash_mla::sm90::fence_async_proxy();  // the copy engine will write there
    sync_warpgroup();
  }

  // Logits of keys that a row does not attend become -inf.
  __device__ __forceinline__ void look_at_keys(int32_t tile, uint64_t missing) {
    if constexpr (!C::kCodes) {
      const float scale = slot().scale_log2;
      if (!(scale > 0.0f)) {
#pragma unroll
        for (float& s : s_) s *= scale;
      }
    }
    const Place at;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t key = first_key(at) + 8 * half;
      const int32_t place = missing >> key & 1 ? kMissing : tile * kTileKeys + key;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const int2 visible = *reinterpret_cast<const int2*>(&smem_.visible[8 * j + 2 * at.t]);
        if (place >= visible.x) s_[4 * j + 2 * half] = -kInfinity;
        if (place >= visible.y) s_[4 * j + 2 * half + 1] = -kInfinity;
      }
    }
  }
  static constexpr int32_t kMissing = 0x7fffffff;

  // A logit, in units of log2 over the standing maximum.
  __device__ __forceinline__ float over_maximum(int i, float max, float factor) const {
    if constexpr (C::kScaled) {
      const int half = i / 2 % 2;
      return fmaf(s_[i], factor * pow2(exponent_[half]), static_cast<float>(exponent_[half]) - max);
    } else {
      return fmaf(s_[i], factor, -max);
    }
  }

  // Softmax of the own tile.
  __device__ __forceinline__ void attend_own(int32_t tile, uint32_t count) {
    flash_mla::sm90::wgmma_wait<0>();
    pin_logits();
    const uint64_t missing =
        *static_cast<volatile uint64_t*>(&smem_.missing_keys[count % C::kStages]);
    const bool complete = __all_sync(kAllLanes, missing == 0);
    if (tile >= partial_from_ || !complete) look_at_keys(tile, missing);
    if (kShared && tile > 0) follow_sums();

    // Does a row exceed its standing maximum by much?
    const Place at;
    const auto state = [&](int j) {
      return *reinterpret_cast<const float4*>(&states()[8 * j + 2 * at.t]);
    };
    float high = -kInfinity;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = state(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high =
            fmaxf(high, over_maximum(4 * j + i, i % 2 ? rows.z : rows.x, i % 2 ? rows.w : rows.y));
      }
    }
    const bool grown =
        flash_mla::sm90::any_in_warpgroup(kWarpgroupSync + wg_, high > kRescaleThresholdLog2);
    const uint32_t turn = own_turn_;
    if (grown) grow(turn, tile > 0);
    if constexpr (kShared) {
      if (threadIdx.x % kWarpgroup == 0) smem_.grown[wg_][turn % 2] = grown;
      __syncwarp();
      if (at.lane == 0) flash_mla::sm90::arrive(smem_.max_full[wg_]);
      __syncwarp();
    }

    float sums[kN / 4];  // [2 j + e]: of this thread's two keys, for row 8 j + 2 t + e
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = state(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s_[4 * j + i];
        x = flash_mla::sm90::fast_exp2(
            over_maximum(4 * j + i, i % 2 ? rows.z : rows.x, i % 2 ? rows.w : rows.y));
        if (i < 2) {
          sums[2 * j + i % 2] = C::kScaled ? x * pow2(-exponent_[0]) : x;
        } else {
          sums[2 * j + i % 2] += C::kScaled ? x * pow2(-exponent_[1]) : x;
        }
      }
    }
    flash_mla::sm90::add_up_keys<kN / 4>(at, sums);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] += sums[i];
    // The other warpgroup is done with P of the last turn; this one was when it voted.
    if constexpr (kShared) flash_mla::sm90::wait(smem_.p_empty[wg_], (turn + 1) % 2);
    if constexpr (C::kScaled) write_multipliers(at, count);
    flash_mla::sm90::store_p<kN>(at, smem_.p[wg_], [&](int i) {
      return flash_mla::sm90::pack<C::kMmaType>(s_[2 * i], s_[2 * i + 1]);
    });
    flash_mla::sm90::fence_async_proxy();
    if constexpr (kShared) {
      __syncwarp();
      if (at.lane == 0) flash_mla::sm90::arrive(smem_.p_full[wg_]);
      __syncwarp();
    } else {
      sync_warpgroup();
    }
  }

  // The standing maxima become those of the tile, where it has larger ones.
  __device__ __forceinline__ void grow(uint32_t turn, bool follows) {
    // The other warpgroup's exponentials of the tile before are relative to those that stand.
    if (kShared && follows) flash_mla::sm90::wait(smem_.p_full[wg_ ^ 1], other_turn_ % 2);
    const Place at;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 rows = *reinterpret_cast<const float4*>(&states()[8 * j + 2 * at.t]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float factor = e == 0 ? rows.y : rows.w;
        float most =
            fmaxf(over_maximum(4 * j + e, 0.0f, factor), over_maximum(4 * j + 2 + e, 0.0f, factor));
#pragma unroll
        for (int d = 4; d < kLanes; d *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
        }
        if (at.g == 0) smem_.column_max[kShared ? 0 : wg_][at.warp][8 * j + 2 * at.t + e] = most;
      }
    }
    sync_warpgroup();
    const int row = at.warp * kLanes + at.lane;
    if (row < kN) {
      RowState& state = states()[row];
      float most = state.max;
#pragma unroll
      for (int w = 0; w < kWarpgroupWarps; ++w) {
        most = fmaxf(most, smem_.column_max[kShared ? 0 : wg_][w][row]);
      }
      smem_.row_factor[wg_][turn % 2][row] = flash_mla::sm90::fast_exp2(state.max - most);
      state.max = most;
    }
    sync_warpgroup();
    rescale_sums(wg_, turn);
    if constexpr (!kShared) rescale_output(wg_, turn);
  }

  const GpuParams& p_;
  SharedStorage<Cfg>& smem_;
  const int32_t member_;
  float s_[kN / 2];  // logits of the own tile: [4 j + 2 half + e] for row 8 j + 2 t + e
  int exponent_[2];  // that P of this thread's keys of the own tile carries (v32_fp8)
  const int wg_;
  uint32_t slot_;         // of the pass
  int32_t partial_from_;  // tiles from here on may hold keys that some row does not attend
  // Where O's columns are shared: tiles of the two warpgroups that are done. Else 0.
  uint32_t own_turn_ = 0, other_turn_ = 0;
};

}  // namespace flash_mla::mla_decode_dense::sm90::transposed
