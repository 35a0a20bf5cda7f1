// What launchers use: the GPU's size, the launch, and the instantiation for a model's shape.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "fp8.cuh"
#include "kernels.h"

namespace quest::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Starts a kernel that may overlap the end of the one before it (see wait_for_previous_kernel).
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// Bytes of dynamic shared memory that each of `ctas_per_multiprocessor` CTAs can have. Allows the
// kernel to use as much. 0 if CUDA refuses. Takes some microseconds: call it once per kernel.
template <typename... Params>
int shared_memory_for(void (*kernel)(Params...), int ctas_per_multiprocessor) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  const int static_bytes = static_cast<int>(attributes.sharedSizeBytes);
  const int of_a_cta = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int of_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int bytes = std::min(of_a_cta, of_all / ctas_per_multiprocessor - reserved) - static_bytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error == cudaSuccess ? bytes : 0;
}

// What a kernel is compiled for: the model's element type and the cache's, the head size, and the
// number of tiles of 8 query heads to which a query group is padded.
template <typename T, typename S, int kHead, int kTiles>
struct Shape {
  using Type = T;
  using Stored = S;
  static constexpr int kHeadSize = kHead, kGroupTiles = kTiles;
};

template <typename T, typename Stored, int kHeadSize, typename F>
cudaError_t for_group(int group_size, F f) {
  return group_size <= 8 ? f(Shape<T, Stored, kHeadSize, 1>())
                         : f(Shape<T, Stored, kHeadSize, 2>());
}

template <typename T, typename Stored, typename F>
cudaError_t for_head_size(int head_size, int group_size, F f) {
  switch (head_size) {
    case 64:
      return for_group<T, Stored, 64>(group_size, f);
    case 96:
      return for_group<T, Stored, 96>(group_size, f);
    case 128:
      return for_group<T, Stored, 128>(group_size, f);
    case 256:
      return for_group<T, Stored, 256>(group_size, f);
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f(Shape<...>()) for the shape of a model's attention with an fp8 cache.
template <typename F>
cudaError_t for_fp8_shape(const KvCache& cache, int group_size, F f) {
  return for_head_size<__nv_bfloat16, Fp8>(cache.head_size, group_size, f);
}

// Calls f(Shape<...>()) for the shape of a model's attention with a cache of 16 bits.
template <typename F>
cudaError_t for_shape(const KvCache& cache, int group_size, F f) {
  return cache.dtype == DType::kBFloat16
             ? for_head_size<__nv_bfloat16, __nv_bfloat16>(cache.head_size, group_size, f)
             : for_head_size<__half, __half>(cache.head_size, group_size, f);
}

// Of both.
template <typename F>
cudaError_t for_any_shape(const KvCache& cache, int group_size, F f) {
  return cache.dtype == DType::kFloat8 ? for_fp8_shape(cache, group_size, f)
                                       : for_shape(cache, group_size, f);
}

}  // namespace quest::cuda
