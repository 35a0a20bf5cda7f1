// Thread-block clusters: CTAs that run at the same time, wait for one another in hardware, and
// reach each other's shared memory. From sm_90 on.
#pragma once

#include <cstdint>

namespace quest::cuda {

constexpr int kMaxClusterLog2 = 4;  // where it is allowed; 8 CTAs are everywhere
constexpr int kMaxClusterCtas = 1 << kMaxClusterLog2;

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// Arrive and wait: what any thread of the cluster wrote before arriving, to shared or device
// memory, the others see after waiting.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where another CTA of the cluster has what this one has at `shared`.
template <typename T>
__device__ __forceinline__ T* of_cta(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  T* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(rank));
  return remote;
#else
  return shared;
#endif
}

}  // namespace quest::cuda
