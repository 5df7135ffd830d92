// Dense MLA decode on Hopper, 16-bit caches, more than 32 query rows a request.
//
//   out[r] = sum_j softmax_j(scale q[r].k[j]) k[j][0:512]     for the 64 query rows r of an M tile
//
// Tile: 64 query rows x 64 keys x d_qk (576 or 512). A CTA walks the keys of its items
// (device/decode_schedule.h) with Q and two K tiles in shared memory and O in registers.
//
//   warps  registers  role
//   0-3    208        attend: Q K^T and softmax of even tiles; columns 0-255 of O
//   4-7    208        attend: of odd tiles; columns 256-511 of O
//   8      88         load: the CTA's items, page table, K
//   9      88         load: Q, what attend must know of an item, K to L2 ahead of time
//   10-11  88         load: K as well, with pages of less than 64 tokens
//
// Shared memory: Q 72 KB, K 2 x 72 KB, P 8 KB, and what config.h lists; one CTA a SM.
//
//   barrier         arrivals                            phase
//   q_full          load + bytes of Q                   item
//   q_empty         8 consumer warps                    item: its last Q K^T is done
//   kv_full[b][p]   load + bytes of the piece           fill of buffer b
//   kv_empty[b][p]  4 warps of the piece's last reader  fill of buffer b
//   p_full[w]       4 warps of warpgroup w              tile of warpgroup w
//
// Bottleneck (README.md has the numbers): with 64 rows and more a request, the tensor cores and
// then power; with fewer, device memory.
#pragma once

#include "mla_decode_dense/sm90/load.cuh"
#include "mla_decode_dense/sm90/store.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

template <class Cfg>
__device__ __forceinline__ void consume(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                        int32_t member) {
  Accumulators acc;
  Attend<Cfg> attend(p, smem, wg, member, acc);
  uint32_t own = 0, other = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    flash_mla::sm90::wait(smem.feed.q_full, index % 2);
    if (uniform(smem.feed.slots[index % 2].item.request) < 0) break;
    attend.item(index, own, other);
    store(p, smem, acc, member, index, wg, attend.row(), attend.lane());
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ GpuParams p, const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw_smem);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t team = static_cast<int32_t>(blockIdx.x) / p.grid.team;
  const int32_t member = static_cast<int32_t>(blockIdx.x) % p.grid.team;

  if (thread == 0) {
    for (int b = 0; b < kBuffers; ++b) {
      for (int piece = 0; piece < kPieces; ++piece) {
        flash_mla::sm90::init(smem.kv_full[b][piece], 1);
        flash_mla::sm90::init(smem.kv_empty[b][piece], kWarpgroupWarps);
      }
    }
    for (int wg = 0; wg < kConsumers; ++wg) {
      flash_mla::sm90::init(smem.p_full[wg], kWarpgroupWarps);
    }
    flash_mla::sm90::init(smem.feed.q_full, 1);
    flash_mla::sm90::init(smem.feed.q_empty, kConsumers * kWarpgroupWarps);
    flash_mla::sm90::fence_barrier_init();
    smem.num_split = 0;
    smem.loaded = -1;
  }
  if (thread == kConsumerThreads) {
    flash_mla::sm90::prefetch_map(maps.q);
    flash_mla::sm90::prefetch_map(maps.kv_pair);
    flash_mla::sm90::prefetch_map(maps.kv_one);
  }
  clear_query_rows(smem.q, SharedStorage<Cfg>::kColumnBlocks, kColumnBlockBytes,
                   p.grid.tiles.rows());
  const auto& runs = measure_after_predecessor(p, smem.p);

  const int warpgroup = uniform(thread / kWarpgroup);
  if (warpgroup == kConsumers) {
    flash_mla::sm90::give_registers<kProducerRegisters<kConsumerRegisters>>();
    load(p, maps, smem, runs, team, member);
  } else {
    flash_mla::sm90::take_registers<kConsumerRegisters>();
    consume(p, smem, warpgroup, member);
    constexpr DType kOut = kMmaType<Cfg>;
    // Each meeting is behind a barrier, so the last loads have been read: K's buffers are free.
    merge_split_units<Op, kOut, PartColumns::kFragments, kConsumerThreads>(
        p, smem.split_items, smem.num_split, member, part_writers(p), thread, smem.k, smem.outcomes,
        [] { flash_mla::sm90::named_barrier_sync(kMerging, kConsumerThreads); });
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90
