#include "device/scalar.h"

#include <cmath>
#include <limits>

#include "device/quant.h"
#include "support.h"

using namespace flash_mla;

TEST(every_e4m3_code_survives_a_round_trip) {
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      EXPECT(std::isnan(value));
    } else {
      EXPECT(float_to_e4m3(value) == code);
    }
  }
  EXPECT(e4m3_to_float(0x7e) == 448.0f);
  EXPECT(e4m3_to_float(0x01) == 0x1p-9f);
}

TEST(e4m3_rounds_to_nearest_even_and_saturates) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1));
    const float middle = 0.5f * (low + high);
    EXPECT(float_to_e4m3(std::nextafter(middle, low)) == code);
    EXPECT(float_to_e4m3(std::nextafter(middle, high)) == code + 1);
    EXPECT(float_to_e4m3(middle) == (code % 2 == 0 ? code : code + 1));
  }
  EXPECT(float_to_e4m3(1e9f) == 0x7e);
  EXPECT(float_to_e4m3(-std::numeric_limits<float>::infinity()) == 0xfe);
}

TEST(every_e2m1_code_survives_and_rounds_to_nearest_even) {
  for (int code = 0; code < 16; ++code) {
    EXPECT(float_to_e2m1(e2m1_to_float(static_cast<uint8_t>(code))) == code);
  }
  for (int code = 0; code < 7; ++code) {
    const float middle = 0.5f * (e2m1_to_float(static_cast<uint8_t>(code)) +
                                 e2m1_to_float(static_cast<uint8_t>(code + 1)));
    EXPECT(float_to_e2m1(middle) == (code % 2 == 0 ? code : code + 1));
  }
  EXPECT(float_to_e2m1(100.0f) == 7);
}

TEST(every_half_and_bfloat16_survives_a_round_trip) {
  for (int bits = 0; bits < 65536; ++bits) {
    const auto code = static_cast<uint16_t>(bits);
    const float half = fp16_to_float(code);
    EXPECT(std::isnan(half) ? std::isnan(fp16_to_float(float_to_fp16(half)))
                            : float_to_fp16(half) == code);
    const float brain = bf16_to_float(code);
    EXPECT(std::isnan(brain) ? std::isnan(bf16_to_float(float_to_bf16(brain)))
                             : float_to_bf16(brain) == code);
  }
  EXPECT(float_to_fp16(65519.0f) == 0x7bff);
  EXPECT(float_to_fp16(65520.0f) == 0x7c00);
}

TEST(a_tile_scale_is_the_smallest_that_holds_the_tile) {
  const KvLayout& v32 = kv_layout(KvFormat::kV32Fp8);
  EXPECT(tile_scale(v32, 448.0f).value == 1.0f);
  EXPECT(tile_scale(v32, 448.1f).value == 2.0f);
  EXPECT(tile_scale(v32, 0.0f).value == 0x1p-13f);  // the power of two above 1e-4
  EXPECT(tile_scale(kv_layout(KvFormat::kV4Fp8), 448.0f).code == 127);
  const KvLayout& fp4 = kv_layout(KvFormat::kV41Fp4);
  EXPECT(tile_scale(fp4, 6.0f).value == 1.0f);
  EXPECT(tile_scale(fp4, 6.1f).value == 1.125f);
  EXPECT(tile_scale(fp4, 0.0f).value == 0x1p-6f);
}

TEST_MAIN()
