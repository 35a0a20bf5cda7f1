// cluster_decode: the launcher, on the host. See DESIGN.md, "Clusters".
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "kernel.cuh"

namespace quest::cuda {

template <typename M, bool kFarKeys>
struct ClusterLauncher {
  using Layout = ClusterLayout<typename M::Stored, M::kHeadSize, M::kGroupTiles>;
  using Split = SplitDecode<typename M::Type, typename M::Stored, M::kHeadSize, M::kGroupTiles>;
  static constexpr auto kernel = cluster_decode_kernel<typename M::Type, typename M::Stored,
                                                       M::kHeadSize, M::kGroupTiles, kFarKeys>;

  // What the current device has room for, with so many stages to a warp's ring.
  struct Limits {
    int stages;
    int shared_bytes;                   // dynamic shared memory of a CTA
    int clusters[kMaxClusterCtas + 1];  // clusters that run at once, by their number of CTAs
  };

  static cudaLaunchConfig_t config(int clusters, int ctas, int shared_bytes, cudaStream_t stream,
                                   cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters * ctas);
    config.blockDim = dim3(Layout::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
  }

  // The kernel's most CTAs per multiprocessor, with the fewest stages to a ring, and no clusters of
  // several CTAs.
  static const Limits& most_ctas() {
    static const Limits found = find_limits(Layout::kMinStages, Layout::kCtasPerMultiprocessor, 1);
    return found;
  }

  // One CTA per multiprocessor, with all stages, in clusters of up to 16 CTAs. A CTA of write_kv,
  // whose only shared memory is what CUDA reserves, fits beside it: decode begins before the write
  // ends.
  static const Limits& one_cta() {
    static const Limits found = find_limits(Layout::kMaxStages, 1, kMaxClusterCtas);
    return found;
  }

  // The cluster sizes in use: 16 CTAs, then 8 and fewer. With a ninth CTA, a warp sends its keys in
  // another round of messages. That is worth it for fp8, where bounds come twice as fast and a
  // warp's own work counts.
  static int next_smaller(int ctas) {
    return kIsFp8<typename M::Stored> ? ctas - 1 : std::min(ctas - 1, kReceiversAtOnce);
  }

  static Limits find_limits(int stages, int ctas_per_multiprocessor, int max_ctas) {
    Limits limits = {.stages = stages};
    const int beside = ctas_per_multiprocessor == 1
                           ? device_attribute(cudaDevAttrReservedSharedMemoryPerBlock)
                           : 0;
    const int bytes = shared_memory_for(kernel, ctas_per_multiprocessor) - beside;
    shared_memory_for(kernel, 1);  // Allow the kernel the most, whichever limits are found last.
    if (bytes < Layout::keys(stages) ||
        bytes < int{sizeof(typename Layout::Barriers)} + Split::shared_bytes(stages, kMaxRows)) {
      return limits;
    }
    limits.shared_bytes = bytes;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (int ctas = max_ctas; ctas > 0; ctas = next_smaller(ctas)) {
      cudaLaunchAttribute attributes[2];
      const auto one = config(1, ctas, bytes, nullptr, attributes);
      if (cudaOccupancyMaxActiveClusters(&limits.clusters[ctas], kernel, &one) != cudaSuccess) {
        limits.clusters[ctas] = 0;
        cudaGetLastError();  // The device has no clusters of this size.
      }
    }
    return limits;
  }

  // Pages of a row whose keys fit shared memory.
  static int room(const Limits& limits) {
    return limits.clusters[1] == 0 ? 0 : Layout::room(limits.shared_bytes, limits.stages);
  }

  // Few rows get the largest clusters that all run at once with a multiprocessor to each CTA.
  // Larger clusters with two CTAs per multiprocessor are slower. Many rows get two CTAs per
  // multiprocessor, unless their keys need a multiprocessor's whole memory.
  static cudaError_t launch(const ClusterDecodeParams& params, const FarKeys& far_keys,
                            const KvScales& scales, cudaStream_t stream) {
    const KvCache& cache = params.decode.cache;
    const Rows& rows = params.decode.rows;
    const int pairs = rows.num_rows * cache.num_kv_heads;
    int ctas = kMaxClusterCtas;
    while (ctas > 1 && one_cta().clusters[ctas] < pairs) ctas = next_smaller(ctas);
    const bool all_at_once = one_cta().clusters[ctas] >= pairs;
    const bool need_whole_memory = rows.max_blocks * cache.pages_per_block > room(most_ctas());
    const Limits& limits = all_at_once || need_whole_memory ? one_cta() : most_ctas();
    if (limits.clusters[1] == 0) return cudaErrorInvalidConfiguration;
    const int num_split_ctas = std::min(pairs * ctas, max_decode_ctas());
    const Divisors divisors = {.page_size = Divisor(cache.page_size),
                               .pages_per_block = Divisor(cache.pages_per_block),
                               .num_kv_heads = Divisor(cache.num_kv_heads),
                               .ctas = Divisor(ctas),
                               .share = Divisor(Layout::share_of(params.decode.group_size, ctas))};
    cudaLaunchAttribute attributes[2];
    const auto all = config(pairs, ctas, limits.shared_bytes, stream, attributes);
    return cudaLaunchKernelEx(&all, kernel, params, divisors, ctas, limits.stages, room(limits),
                              num_split_ctas, far_keys, scales);
  }
};

}  // namespace quest::cuda
