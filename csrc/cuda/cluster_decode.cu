// cluster_decode: score, select and sparse_decode in one launch.
#include "cluster_decode.cuh"

namespace quest::cuda {

// In a file of its own, since either takes long to compile.
cudaError_t cluster_decode_wide(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                cudaStream_t stream);

int max_cluster_pages(const KvCache& cache, int group_size) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  int pages = 0;
  for_shape(cache, group_size, [&](auto shape) {
    using Launcher = ClusterLauncher<decltype(shape), false>;
    pages = Launcher::room(Launcher::alone());
    return cudaSuccess;
  });
  return pages;
}

cudaError_t cluster_decode(const ClusterDecodeParams& params, const FarKeys& far_keys,
                           cudaStream_t stream) {
  const KvCache& cache = params.decode.cache;
  const int group_size = params.decode.group_size;
  const int pages = params.decode.rows.max_blocks * cache.pages_per_block;
  if (pages > max_cluster_pages(cache, group_size)) {
    return cluster_decode_wide(params, far_keys, stream);
  }
  return for_shape(cache, group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), false>::launch(params, far_keys, stream);
  });
}

}  // namespace quest::cuda
