// cluster_decode for caches of 16 bits without far keys, and its limits.
#include "launch.cuh"

namespace quest::cuda {

// Compiled in files of their own, since each takes long.
cudaError_t cluster_decode_far_keys(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                    cudaStream_t stream);
cudaError_t cluster_decode_fp8(const ClusterDecodeParams& params, const FarKeys& far_keys,
                               const KvScales& scales, cudaStream_t stream);
int max_cluster_pages_fp8(const KvCache& cache, int group_size);

int max_cluster_pages(const KvCache& cache, int group_size, bool has_far_keys) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  int pages = 0;
  if (cache.dtype == DType::kFloat8) {
    pages = max_cluster_pages_fp8(cache, group_size);
  } else {
    for_shape(cache, group_size, [&](auto shape) {
      using Launcher = ClusterLauncher<decltype(shape), false>;
      pages = Launcher::room(Launcher::one_cta());
      return cudaSuccess;
    });
  }
  return has_far_keys ? kFarFactor * pages : pages;
}

cudaError_t cluster_decode(const ClusterDecodeParams& params, const FarKeys& far_keys,
                           const KvScales& scales, cudaStream_t stream) {
  if (params.decode.cache.dtype == DType::kFloat8) {
    return cluster_decode_fp8(params, far_keys, scales, stream);
  }
  if (far_keys.data != nullptr) return cluster_decode_far_keys(params, far_keys, stream);
  return for_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), false>::launch(params, far_keys, scales, stream);
  });
}

}  // namespace quest::cuda
