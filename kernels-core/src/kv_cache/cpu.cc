// KV-cache operators on the CPU: one token at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "device/cpu/token.h"
#include "device/quant.h"
#include "device/scalar.h"
#include "kv_cache/problem.h"
#include "runtime/threads.h"
#include "runtime/variant.h"

namespace flash_mla::kv_cache {

namespace {

constexpr int kMaxDim = kLatentDim + kRopeDim;

// Tokens of a unit of work.
constexpr int64_t kTokensPerUnit = 16;

void store_plain(const PagedKv& cache, const float* values, float scale, uint8_t* row) {
  switch (kv_layout(cache.format).value) {
    case KvValue::kBf16: return cpu::store_row(DType::kBFloat16, values, cache.d_qk, 1.0f, row);
    case KvValue::kFp16: return cpu::store_row(DType::kFloat16, values, cache.d_qk, 1.0f, row);
    default:
      for (int c = 0; c < cache.d_qk; ++c) row[c] = float_to_e4m3(values[c] / scale);
  }
}

void store_packed(const KvLayout& layout, const float* values, uint8_t* row, uint8_t* scales) {
  for (int tile = 0, c = 0; c < layout.d_nope; ++tile, c += layout.scale_tile) {
    float amax = 0.0f;
    for (int x = 0; x < layout.scale_tile; ++x) amax = std::fmax(amax, std::fabs(values[c + x]));
    const TileScale scale = tile_scale(layout, amax);
    if (layout.scale == KvScale::kFloat32) {
      std::memcpy(scales + tile * sizeof(float), &scale.value, sizeof(float));
    } else {
      scales[tile] = scale.code;
    }
    for (int x = 0; x < layout.scale_tile; ++x) {
      const float value = values[c + x] / scale.value;
      if (layout.value == KvValue::kE4m3) {
        row[c + x] = float_to_e4m3(value);
      } else if (x % 2 == 0) {
        row[(c + x) / 2] = float_to_e2m1(value);
      } else {
        row[(c + x) / 2] |= static_cast<uint8_t>(float_to_e2m1(value) << 4);
      }
    }
  }
  if (layout.d_rope() > 0) {
    cpu::store_row(DType::kBFloat16, values + layout.d_nope, layout.d_rope(), 1.0f,
                   row + layout.rope_offset_bytes);
  }
  // What lies behind the last scale (a pad byte) is zero, so that equal tokens have equal bytes.
  const int num_tiles = layout.d_nope / layout.scale_tile;
  for (int i = num_tiles; i < layout.page_scale_bytes; ++i) scales[i] = 0;
}

void copy_token(const Params& p, int64_t token, int32_t head) {
  const PagedKv& cache = p.cache;
  alignas(64) float values[kMaxDim];
  const int64_t element_bytes = p.kv_dtype == DType::kFloat32 ? 4 : 2;
  uint8_t* kv =
      static_cast<uint8_t*>(p.kv) + (token * p.kv_stride_t + head * p.kv_stride_h) * element_bytes;
  const int64_t slot = p.slot(token);
  const bool exists = cache.has_slot(slot);
  const int64_t page = exists ? slot / cache.page_size : 0;
  const int64_t offset = exists ? slot % cache.page_size : 0;
  const float scale = p.scale == nullptr ? 1.0f : *p.scale;
  if (p.direction == Direction::kGather) {
    if (exists) {
      cpu::load_token(cache, page, offset, head, values);
    } else {
      std::fill_n(values, cache.d_qk, 0.0f);
    }
    return cpu::store_row(p.kv_dtype, values, cache.d_qk, scale, kv);
  }
  if (!exists) return;
  cpu::load_row(p.kv_dtype, kv, cache.d_qk, values);
  // The cache is this call's output: PagedKv points to it as const for the attention kernels.
  auto* row = const_cast<uint8_t*>(cache.row(page, offset, head));
  const KvLayout& layout = kv_layout(cache.format);
  if (layout.packed()) {
    store_packed(layout, values, row, const_cast<uint8_t*>(cache.scales(page, offset)));
  } else {
    store_plain(cache, values, scale, row);
  }
}

Status launch(const Problem& p, const Workspace&, Stream) {
  const int64_t units = (p.num_tokens + kTokensPerUnit - 1) / kTokensPerUnit;
  parallel_for(units, [&](int64_t unit) {
    const int64_t end = std::min((unit + 1) * kTokensPerUnit, p.num_tokens);
    for (int64_t token = unit * kTokensPerUnit; token < end; ++token) {
      for (int32_t head = 0; head < p.cache.h_kv; ++head) copy_token(p, token, head);
    }
  });
  return {};
}

}  // namespace

extern constinit const Variant<Problem> variant_cpu = {"cpu", Row::kCpu, supports_all<Problem>,
                                                       no_workspace<Problem>, launch};

}  // namespace flash_mla::kv_cache
