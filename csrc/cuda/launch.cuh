// How the launchers start a kernel: the GPU's size, the grid, the instantiation for a model's
// shape.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"

namespace quest::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// CTAs of a kernel that one multiprocessor holds at a time. Allows the kernel `shared_bytes` of
// dynamic shared memory, and kMaxRows integers more.
template <typename Params>
int ctas_per_multiprocessor(void (*kernel)(Params), int threads, int shared_bytes) {
  const int few_rows = 64;
  const int of_a_row = sizeof(int);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       shared_bytes + kMaxRows * of_a_row);
  int ctas = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, threads,
                                                shared_bytes + few_rows * of_a_row);
  return ctas > 0 ? ctas : 1;
}

// Starts a kernel that may overlap the end of the one before it (see wait_for_previous_kernel).
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), int ctas, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// How many stages of shared memory a CTA can have, beside `fixed` bytes, where `ctas` of them share
// a multiprocessor. Allows the kernel as much.
template <typename... Params>
int stages_that_fit(void (*kernel)(Params...), int fixed, int stage_bytes, int ctas,
                    int max_stages) {
  const int of_a_cta = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int of_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, of_a_cta);
  const int room = std::min(of_a_cta, of_all / ctas - reserved) - fixed;
  return std::clamp(room / stage_bytes, 1, max_stages);
}

// What a kernel is compiled for: the element type, the head size, and how many groups of 8 query
// heads a KV head's query group is padded to.
template <typename T, int kHead, int kTiles>
struct Shape {
  using Type = T;
  static constexpr int kHeadSize = kHead, kGroupTiles = kTiles;
};

template <typename T, int kHeadSize, typename F>
cudaError_t for_group(int group_size, F f) {
  return group_size <= 8 ? f(Shape<T, kHeadSize, 1>()) : f(Shape<T, kHeadSize, 2>());
}

template <typename T, typename F>
cudaError_t for_head_size(int head_size, int group_size, F f) {
  switch (head_size) {
    case 64:
      return for_group<T, 64>(group_size, f);
    case 96:
      return for_group<T, 96>(group_size, f);
    case 128:
      return for_group<T, 128>(group_size, f);
    case 256:
      return for_group<T, 256>(group_size, f);
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f(Shape<...>()) with the shape that a model's attention has.
template <typename F>
cudaError_t for_shape(const KvCache& cache, int group_size, F f) {
  return cache.dtype == DType::kBFloat16
             ? for_head_size<__nv_bfloat16>(cache.head_size, group_size, f)
             : for_head_size<__half>(cache.head_size, group_size, f);
}

}  // namespace quest::cuda
