// device/online_softmax.h on a GPU: the conventions must be the host's.
#include "device/online_softmax.h"

#include <cuda_runtime.h>

#include <cmath>

#include "support.h"

namespace {

using flash_mla::kInfinity;
using flash_mla::MergeWeights;

__global__ void merge_kernel(const float* lse_a, const float* lse_b, MergeWeights* weights,
                             float* sink, int count) {
  const int i = threadIdx.x;
  if (i >= count) return;
  weights[i] = flash_mla::merge_weights(lse_a[i], lse_b[i]);
  sink[i] = flash_mla::sink_factor(lse_a[i], lse_b[i]);
}

bool close(float a, float b) { return a == b || std::fabs(a - b) <= 1e-5f * (1 + std::fabs(b)); }

}  // namespace

TEST(merge_and_sink_agree_with_the_host) {
  constexpr int kCount = 8;
  const float a[kCount] = {0, 1, -5, kInfinity, -kInfinity, 100, -80, kInfinity};
  const float b[kCount] = {0, -kInfinity, kInfinity, 3, -kInfinity, 101, 90, kInfinity};
  float* lse = nullptr;
  float* sink = nullptr;
  MergeWeights* weights = nullptr;
  EXPECT(cudaMalloc(&lse, 2 * sizeof(a)) == cudaSuccess);
  EXPECT(cudaMalloc(&sink, sizeof(a)) == cudaSuccess);
  EXPECT(cudaMalloc(&weights, kCount * sizeof(MergeWeights)) == cudaSuccess);
  EXPECT(cudaMemcpy(lse, a, sizeof(a), cudaMemcpyHostToDevice) == cudaSuccess);
  EXPECT(cudaMemcpy(lse + kCount, b, sizeof(b), cudaMemcpyHostToDevice) == cudaSuccess);
  merge_kernel<<<1, 32>>>(lse, lse + kCount, weights, sink, kCount);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  MergeWeights merged[kCount];
  float factor[kCount];
  EXPECT(cudaMemcpy(merged, weights, sizeof(merged), cudaMemcpyDeviceToHost) == cudaSuccess);
  EXPECT(cudaMemcpy(factor, sink, sizeof(factor), cudaMemcpyDeviceToHost) == cudaSuccess);
  for (int i = 0; i < kCount; ++i) {
    const MergeWeights expected = flash_mla::merge_weights(a[i], b[i]);
    EXPECT(close(merged[i].a, expected.a));
    EXPECT(close(merged[i].b, expected.b));
    EXPECT(close(merged[i].lse, expected.lse));
    EXPECT(close(factor[i], flash_mla::sink_factor(a[i], b[i])));
  }
  cudaFree(lse);
  cudaFree(sink);
  cudaFree(weights);
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return flash_mla::test::kSkipped;
  }
  for (const auto& test : flash_mla::test::cases()) {
    test.run();
    std::printf("%s\n", test.name);
  }
  return flash_mla::test::failures() == 0 ? 0 : 1;
}
