// cluster_decode for tables that hold more pages than shared memory has room for keys.
#include "cluster_decode.cuh"

namespace quest::cuda {

cudaError_t cluster_decode_wide(const ClusterDecodeParams& params, const FarKeys& far_keys,
                                cudaStream_t stream) {
  return for_shape(params.decode.cache, params.decode.group_size, [&](auto shape) {
    return ClusterLauncher<decltype(shape), true>::launch(params, far_keys, stream);
  });
}

}  // namespace quest::cuda
