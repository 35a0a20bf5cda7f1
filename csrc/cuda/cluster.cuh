// Thread-block clusters (from sm_90 on): CTAs that run at the same time, synchronise in hardware
// and access each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device.cuh"

namespace quest::cuda {

constexpr int kMaxClusterCtas = 16;  // Every GPU has clusters of 8 CTAs; some allow 16.

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

// cluster_arrive, then cluster_wait: wait until all threads of the cluster have arrived. They order
// the initialisation of barriers, and no other accesses to memory.
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

// Wait for all threads of the cluster. All of them see each other's earlier writes, to device
// memory as well.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address in another CTA's shared memory that corresponds to `local` in this CTA's.
__device__ __forceinline__ uint32_t address_in(const void* local, int rank) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return address;
#endif
}

// Write to the shared memory of another CTA, in a cluster of several. The receiver's `barrier`
// counts the bytes, and its phase ends when all expected bytes have arrived. No fence is needed: a
// fence would wait for device memory as well.
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

// This CTA in its cluster, and messages to the cluster's CTAs.
struct ClusterCta {
  int ctas, rank;  // CTAs of the cluster, and this one's number

  // Write a message to any CTA of the cluster. `to` and `barrier` are this CTA's addresses of the
  // target and of the barrier that counts it. The receiver reads it after wait_for(barrier).
  template <typename Message, typename Target>
  __device__ void tell(int cta, Target* to, const Barrier& barrier, const Message& message) const {
    if (ctas == 1) {
      *reinterpret_cast<Message*>(to) = message;
    } else {
      send(address_in(to, cta), address_in(&barrier, cta), message);
    }
  }
  __device__ void wait_for(const Barrier& barrier) const {
    if (ctas == 1) {
      __syncthreads();
    } else {
      barrier.wait(0);
    }
  }
};

}  // namespace quest::cuda
