#include "device/paged_kv.h"

#include "support.h"

using namespace flash_mla;

TEST(scales_follow_their_token_or_their_page) {
  const uint8_t* base = nullptr;
  const PagedKv v32 = {.data = base,
                       .format = KvFormat::kV32Fp8,
                       .d_qk = 576,
                       .num_pages = 4,
                       .page_size = 64,
                       .page_stride_bytes = 64 * 656,
                       .token_stride_bytes = 656,
                       .head_stride_bytes = 656};
  EXPECT(v32.row(1, 2, 0) - base == 64 * 656 + 2 * 656);
  EXPECT(v32.scales(1, 2) - base == 64 * 656 + 2 * 656 + 512);

  PagedKv v4 = v32;
  v4.format = KvFormat::kV4Fp8;
  v4.page_stride_bytes = 37440;  // 64 * 584 = 37376, rounded up to a multiple of 576
  v4.token_stride_bytes = 584;   // of the view; tokens lie 576 bytes apart
  EXPECT(v4.row(1, 2, 0) - base == 37440 + 2 * 576);
  EXPECT(v4.scales(1, 2) - base == 37440 + 64 * 576 + 2 * 8);
}

TEST(slots_outside_the_cache_do_not_exist) {
  const PagedKv kv = {.num_pages = 3, .page_size = 16};
  EXPECT(kv.has_slot(0) && kv.has_slot(47));
  EXPECT(!kv.has_slot(-1) && !kv.has_slot(48));
  EXPECT(!kv.has_page(-1) && !kv.has_page(3));
}

TEST(offsets_beyond_two_gigabytes_do_not_wrap) {
  const PagedKv kv = {.num_pages = 1 << 20,
                      .page_size = 64,
                      .page_stride_bytes = 64 * 1152,
                      .token_stride_bytes = 1152};
  EXPECT(kv.row((1 << 20) - 1, 63, 0) - kv.data == ((int64_t{1} << 26) - 1) * 1152);
}

TEST_MAIN()
