// Addressing a token of a paged cache.
#pragma once

#include <cstdint>

#include "device/kv_format.h"
#include "device/macros.h"

namespace flash_mla {

// A cache, in bytes: strides are 64-bit, caches can exceed 2^31 elements.
struct PagedKv {
  const uint8_t* data = nullptr;
  KvFormat format = KvFormat::kBf16;
  int32_t d_qk = 0;
  int32_t h_kv = 1;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t page_stride_bytes = 0;
  int64_t token_stride_bytes = 0;
  int64_t head_stride_bytes = 0;

  FLASH_MLA_HD int64_t num_slots() const { return num_pages * page_size; }
  FLASH_MLA_HD bool has_page(int64_t page) const { return page >= 0 && page < num_pages; }
  FLASH_MLA_HD bool has_slot(int64_t slot) const { return slot >= 0 && slot < num_slots(); }

  // The first byte of a token. Kernels know the layout at compile time and pass it.
  FLASH_MLA_HD const uint8_t* row(const KvLayout& layout, int64_t page, int64_t offset,
                                  int32_t head) const {
    // A page with scales at its end holds its tokens densely, whatever the view's stride says.
    const int64_t token_stride = layout.page_scale_bytes ? layout.row_bytes : token_stride_bytes;
    return data + page * page_stride_bytes + offset * token_stride + head * head_stride_bytes;
  }
  FLASH_MLA_HD const uint8_t* row(int64_t page, int64_t offset, int32_t head) const {
    return row(kv_layout(format), page, offset, head);
  }

  // The first byte of a token's scales.
  FLASH_MLA_HD const uint8_t* scales(const KvLayout& layout, int64_t page, int64_t offset) const {
    if (layout.scales_offset_bytes != kPageScales) {
      return row(layout, page, offset, 0) + layout.scales_offset_bytes;
    }
    return data + page * page_stride_bytes + page_size * layout.row_bytes +
           offset * layout.page_scale_bytes;
  }
  FLASH_MLA_HD const uint8_t* scales(int64_t page, int64_t offset) const {
    return scales(kv_layout(format), page, offset);
  }
};

}  // namespace flash_mla
