// cluster_decode without far keys, and its limits.
#include "launch.cuh"

namespace quest::cuda {

// Compiled in a file of its own, since each of the two takes long.
cudaError_t cluster_decode_far_keys(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                    cudaStream_t stream);

int max_cluster_pages(const KvCache& cache, int group_size, bool has_far_keys) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  int pages = 0;
  for_shape(cache, group_size, [&](auto shape) {
    using Launcher = ClusterLauncher<decltype(shape), false>;
    pages = Launcher::room(Launcher::one_cta());
    return cudaSuccess;
  });
  return has_far_keys ? kFarFactor * pages : pages;
}

cudaError_t cluster_decode(const ClusterDecodeParams& params, const FarKeys& far_keys,
                           cudaStream_t stream) {
  if (far_keys.data != nullptr) return cluster_decode_far_keys(params, far_keys, stream);
  return for_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), false>::launch(params, far_keys, stream);
  });
}

}  // namespace quest::cuda
