// Thread-block clusters: CTAs that run at the same time, wait for one another in hardware, and
// reach each other's shared memory. From sm_90 on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quest::cuda {

constexpr int kMaxClusterCtas = 16;  // where it is allowed; 8 CTAs are everywhere

__device__ __forceinline__ int cluster_number() {
  uint32_t number = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
#endif
  return static_cast<int>(number);
}

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// Arrive, then wait until all threads of the cluster have arrived. Orders nothing but barriers'
// initialisation.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Wait for all threads of the cluster. What they wrote before, in device memory as well, is seen by
// all after it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where another CTA of the cluster has what this one has at `shared`.
__device__ __forceinline__ uint32_t address_in(const void* shared, int rank) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return address;
#endif
}

// Write to another CTA's shared memory, of a cluster of several. Its `barrier` counts the bytes:
// the write has arrived when all that it expects have. No fence is needed, which would wait for
// device memory as well.
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const uint2& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, "
      "[%3];" ::"r"(to),
      "r"(x.x), "r"(x.y), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, const uint4& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
#endif
}

}  // namespace quest::cuda
