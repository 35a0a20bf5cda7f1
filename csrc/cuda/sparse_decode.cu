// sparse_decode: attention of one query token over a row's selected pages, or over all of them.
//
// Bytes: 4 * head_size per attended token and KV head, or 2 * head_size in fp8, each read once. All
// other traffic is small.
#include <algorithm>

#include "launch.cuh"
#include "split_decode.cuh"

namespace quest::cuda {
namespace {

// On an H200, 1 CTA of 8 warps, with 2 stages or more, is the fastest or within 2% of it. 2 CTAs of
// 4 warps are as fast where rows are many, and slower where they are few.
constexpr int kCtasPerMultiprocessor = 1;

template <typename T, typename Stored, int kHeadSize, int kGroupTiles>
__global__ void __launch_bounds__(SplitDecode<T, Stored, kHeadSize, kGroupTiles>::kThreads, 1)
    sparse_decode_kernel(const __grid_constant__ SparseDecodeParams p, int stages,
                         const __grid_constant__ KvScales scales) {
  // grid: [CTAs that the GPU holds]; a CTA attends to its part of all chunks.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  SplitDecode<T, Stored, kHeadSize, kGroupTiles>::attend(
      p, scales, shared_memory, stages, blockIdx.x, gridDim.x, [](int) { return true; });
}

template <typename M>
cudaError_t launch_decode(const SparseDecodeParams& params, const KvScales& scales,
                          cudaStream_t stream) {
  using Decode = SplitDecode<typename M::Type, typename M::Stored, M::kHeadSize, M::kGroupTiles>;
  const auto kernel =
      sparse_decode_kernel<typename M::Type, typename M::Stored, M::kHeadSize, M::kGroupTiles>;
  static const int room = shared_memory_for(kernel, kCtasPerMultiprocessor);
  int stages = Decode::S::kMaxStages;
  while (stages > 0 && Decode::shared_bytes(stages, params.rows.num_rows) > room) --stages;
  if (stages == 0) return cudaErrorInvalidConfiguration;
  return launch(kernel, kCtasPerMultiprocessor * num_multiprocessors(), Decode::kThreads,
                Decode::shared_bytes(stages, params.rows.num_rows), stream, params, stages, scales);
}

}  // namespace

int max_decode_ctas() {
  return div_up(kCtasPerMultiprocessor * num_multiprocessors(), 4) * 4;  // to align what follows
}

cudaError_t sparse_decode(const SparseDecodeParams& params, const KvScales& scales,
                          cudaStream_t stream) {
  return for_any_shape(params.cache, params.group_size, [&](auto shape) {
    return launch_decode<decltype(shape)>(params, scales, stream);
  });
}

}  // namespace quest::cuda
