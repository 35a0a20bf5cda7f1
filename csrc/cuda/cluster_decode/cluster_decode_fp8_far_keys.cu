// cluster_decode for fp8 caches with far keys.
#include "launch.cuh"

namespace quest::cuda {

cudaError_t cluster_decode_fp8_far_keys(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                        const KvScales& scales, cudaStream_t stream) {
  return for_fp8_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), true>::launch(params, far_keys, scales, stream);
  });
}

}  // namespace quest::cuda
