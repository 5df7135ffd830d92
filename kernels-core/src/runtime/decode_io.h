// Checking the queries and the results of decode operators.
#pragma once

#include <initializer_list>

#include "device/decode_io.h"
#include "runtime/check.h"

namespace flash_mla {

void parse_decode_query(Check& check, const TensorView& q, std::initializer_list<DType> dtypes,
                        DecodeIo* io);

// head_dim_v and, if they are there already, out (in io->out_dtype) and lse.
void parse_decode_results(Check& check, const TensorView& out, const TensorView& lse,
                          int32_t head_dim_v, Device device, Outputs outputs, DecodeIo* io);

}  // namespace flash_mla
