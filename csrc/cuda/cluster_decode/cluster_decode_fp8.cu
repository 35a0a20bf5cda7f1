// cluster_decode for fp8 caches without far keys, and its limit.
#include "launch.cuh"

namespace quest::cuda {

// Compiled in a file of its own, since each of the two takes long.
cudaError_t cluster_decode_fp8_far_keys(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                        const KvScales& scales, cudaStream_t stream);

int max_cluster_pages_fp8(const KvCache& cache, int group_size) {
  int pages = 0;
  for_fp8_shape(cache, group_size, [&](auto shape) {
    using Launcher = ClusterLauncher<decltype(shape), false>;
    pages = Launcher::room(Launcher::one_cta());
    return cudaSuccess;
  });
  return pages;
}

cudaError_t cluster_decode_fp8(const ClusterDecodeParams& params, const FarKeys& far_keys,
                               const KvScales& scales, cudaStream_t stream) {
  if (far_keys.data != nullptr) {
    return cluster_decode_fp8_far_keys(params, far_keys, scales, stream);
  }
  return for_fp8_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), false>::launch(params, far_keys, scales, stream);
  });
}

}  // namespace quest::cuda
