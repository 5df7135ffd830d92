#include "runtime/decode_io.h"

#include "device/kv_format.h"

namespace flash_mla {

void parse_decode_query(Check& check, const TensorView& q, std::initializer_list<DType> dtypes,
                        DecodeIo* io) {
  check.tensor(q, "q", "[b, s_q, h_q, d_qk]", 4, dtypes).aligned_rows(q, "q");
  check.require(!check.ok() || q.shape[3] == kLatentDim || q.shape[3] == kLatentDim + kRopeDim, "q",
                "have a last dimension (d_qk) of 576 or 512", q.shape[3],
                "pass 512 latent columns, then 64 RoPE columns or none");
  if (!check.ok()) return;
  io->b = q.shape[0];
  io->s_q = q.shape[1];
  io->h_q = q.shape[2];
  io->d_qk = static_cast<int32_t>(q.shape[3]);
  io->q_dtype = q.dtype;
  io->q = q.data;
  io->q_stride_b = q.stride[0];
  io->q_stride_s = q.stride[1];
  io->q_stride_h = q.stride[2];
}

void parse_decode_results(Check& check, const TensorView& out, const TensorView& lse,
                          int32_t head_dim_v, Device device, Outputs outputs, DecodeIo* io) {
  check.require(head_dim_v == kLatentDim, "head_dim_v", "be 512", head_dim_v,
                "pass 512: V is the first 512 columns of K");
  if (outputs == Outputs::kAbsent) return;
  check.tensor(out, "out", "[b, s_q, h_q, d_v]", 4, {io->out_dtype});
  check.size(out, "out", 0, io->b, "b").size(out, "out", 1, io->s_q, "s_q");
  check.size(out, "out", 2, io->h_q, "h_q").size(out, "out", 3, kLatentDim, "head_dim_v");
  check.aligned_rows(out, "out").no_overlap(out, "out").same_device(out, "out", device, "q");
  io->out = out.data;
  io->out_stride_b = out.stride[0];
  io->out_stride_s = out.stride[1];
  io->out_stride_h = out.stride[2];
  check.vector(lse, "lse", "[b, h_q, s_q]", {DType::kFloat32});
  check.size(lse, "lse", 0, io->b, "b").size(lse, "lse", 1, io->h_q, "h_q");
  check.size(lse, "lse", 2, io->s_q, "s_q").no_overlap(lse, "lse");
  check.same_device(lse, "lse", device, "q");
  io->lse = static_cast<float*>(lse.data);
  io->lse_stride_b = lse.stride[0];
  io->lse_stride_h = lse.stride[1];
  io->lse_stride_s = lse.stride[2];
}

}  // namespace flash_mla
