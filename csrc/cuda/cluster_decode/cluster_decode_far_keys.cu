// cluster_decode for caches of 16 bits with far keys.
#include "launch.cuh"

namespace quest::cuda {

cudaError_t cluster_decode_far_keys(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                    cudaStream_t stream) {
  return for_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), true>::launch(params, far_keys, {}, stream);
  });
}

}  // namespace quest::cuda
