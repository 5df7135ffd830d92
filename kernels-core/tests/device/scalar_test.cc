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

TEST(nan_has_neither_sign_nor_payload) {
  for (uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffabcdefu}) {
    const float nan = bits_float(bits);
    EXPECT(float_to_e4m3(nan) == 0x7f);
    EXPECT(float_bits(canonical_nan(nan)) == 0x7fc00000u);
    EXPECT(float_to_bf16(canonical_nan(nan)) == 0x7fc0);
    EXPECT(float_to_fp16(canonical_nan(nan)) == 0x7e00);
    EXPECT((float_to_e2m1(nan) & 7) == 7);
  }
  EXPECT(float_bits(canonical_nan(-0.0f)) == 0x80000000u);
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

// The definition, in double, for amax of every exponent, at and beside where the scale changes.
TEST(tile_scales_are_what_their_definition_says) {
  const KvLayout& e4m3 = kv_layout(KvFormat::kV32Fp8);
  const KvLayout& e2m1 = kv_layout(KvFormat::kV41Fp4);
  const auto check = [&](uint32_t bits) {
    const float amax = bits_float(bits);
    const double wanted = std::fmax(amax / 448.0, kMinTileScale);
    const TileScale scale = tile_scale(e4m3, amax);
    EXPECT(scale.value >= wanted && scale.value / 2 < wanted);
    EXPECT(scale.value == std::ldexp(1.0, scale.code - 127));

    const TileScale small = tile_scale(e2m1, amax);
    const double sixth = std::fmin(std::fmax(amax / 6.0, 0x1p-6), 448.0);
    EXPECT(small.value == e4m3_to_float(small.code) && small.value >= sixth);
    EXPECT(small.code == 8 || e4m3_to_float(static_cast<uint8_t>(small.code - 1)) < sixth);
  };
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (uint32_t significand = 0; significand < 1u << 23; significand += 1u << 18) {
      for (uint32_t beside : {0u, 1u, 2u, 3u, 0x3fffdu, 0x3fffeu, 0x3ffffu}) {
        check(exponent << 23 | (significand + beside));
      }
    }
  }
  for (int code = 8; code < 0x7f; ++code) {  // 6 times each scale, and its neighbours
    const uint32_t bits = float_bits(6.0f * e4m3_to_float(static_cast<uint8_t>(code)));
    for (uint32_t i = bits - 3; i <= bits + 3; ++i) check(i);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT(tile_scale(e4m3, infinity).value == infinity);
  EXPECT(tile_scale(e4m3, infinity).code == 255);
  EXPECT(tile_scale(e2m1, infinity).value == 448.0f);
}

TEST_MAIN()
