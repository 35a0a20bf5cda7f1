// The instructions that all kernels use: dependent launches, loads, copies and matrix products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quest::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16 bytes: 8 elements, two to a word.
struct alignas(16) Vec {
  static constexpr int kElements = 8;
  uint32_t word[4];
};

// Wait until the kernels before this one in the stream have finished, and their stores are visible.
// Before this call a kernel writes nothing in device memory. It reads only lengths, budgets, block
// tables and slots, which no kernel of this library writes. CTAs without work call it as well: a
// kernel that finished before its predecessor would let the next one start too early.
// cluster_decode reads more before this call: see DESIGN.md, "Decode begins beside the write".
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel of this library start, once every CTA has called this. A kernel calls it
// after wait_for_previous_kernel, so when a kernel starts, all but its direct predecessor have
// finished.
__device__ __forceinline__ void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Loads of data that this kernel reads once. They bypass L1, which may hold older data.
__device__ __forceinline__ Vec load_once(const void* address) {
  Vec v;
  asm volatile("ld.global.cg.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float load_once(const float* address) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ float4 load_once(const float4* address) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* address) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ int32_t load_once(const int32_t* address) {
  int32_t v;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

// An mbarrier that tells when copies to shared memory have arrived. Each use is a phase.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&word));
  }

  // Called by one thread. Other threads use the barrier after __syncthreads.
  __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "n"(kWarpSize) : "memory");
#endif
  }

#if __CUDA_ARCH__ >= 900
  // Called by one thread, once a phase. The phase ends when so many bytes have arrived.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
  }
#else
  // Called by all lanes of a warp, once a phase. The phase ends when all their copies have arrived.
  __device__ __forceinline__ void arrive_when_copied() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
  }
#endif

  // Wait until the phase of this parity has ended. The first phase has parity 0, the next 1, and so
  // on in turn.
  __device__ __forceinline__ void wait(uint32_t parity) const {
    uint32_t is_over = 0;
    while (!is_over) {
      asm volatile(
          "{ .reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
          "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
          "selp.b32 %0, 1, 0, p; }"
          : "=r"(is_over)
          : "r"(address()), "r"(parity)
          : "memory");
    }
  }
};

#if __CUDA_ARCH__ >= 900
// The policy of copies of data that is read once: L2 evicts it first. Kernels are 3 to 6% faster
// with it.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copy_bulk(uint32_t to_shared, const void* from, int bytes,
                                          const Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to_shared),
      "l"(from), "r"(bytes), "r"(barrier.address()), "l"(evict_first())
      : "memory");
}
#else
__device__ __forceinline__ void copy_vec(uint32_t to_shared, uint64_t from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}
#endif

// Order this thread's earlier accesses to shared memory before later bulk copies to it. Copies that
// other threads issue are ordered after a barrier.
__device__ __forceinline__ void copies_follow_accesses() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void store(void* address, const Vec& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The low halves (or the high halves) of two words in one word, `first` lower.
__device__ __forceinline__ uint32_t pack_low(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t pack_high(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// Transpose an 8x8 matrix of 16-bit elements held by a warp: lane l has row l / 4, columns
// 2 * (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t elements) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(elements));
  return transposed;
}

// A 16x16 matrix (row-major) held by a warp, two elements to a word. With lane l = 4 * r + c:
// rows r and r + 8 (first index), columns 2c, 2c + 1 and 2c + 8, 2c + 9 (second index).
struct MatrixA {
  uint32_t word[2][2];
};

// Element types: arithmetic on two elements in a word, pairs of infinities, and the matrix unit's
// product.
template <typename T>
struct Element;

#define QUEST_MMA(type)                                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                               \
      : "r"(a.word[0][0]), "r"(a.word[1][0]), "r"(a.word[0][1]), "r"(a.word[1][1]), "r"(b0), \
        "r"(b1))

// `mma`: sum[16 x 8] += a[16 x 16] * b[16 x 8]. With lane l = 4 * r + c: sum has rows r (first two)
// and r + 8 (last two), columns 2c, 2c + 1; b has column r, rows 2c, 2c + 1 (b0) and 2c + 8,
// 2c + 9 (b1).
template <>
struct Element<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr uint32_t kInfinity = 0x7f807f80u, kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ void mma(float (&sum)[4], const MatrixA& a, uint32_t b0,
                                             uint32_t b1) {
    QUEST_MMA("bf16");
  }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
  }
  static __device__ __forceinline__ Pair from_floats(float x, float y) {
    return __floats2bfloat162_rn(x, y);
  }
};

template <>
struct Element<__half> {
  using Pair = __half2;
  static constexpr uint32_t kInfinity = 0x7c007c00u, kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ void mma(float (&sum)[4], const MatrixA& a, uint32_t b0,
                                             uint32_t b1) {
    QUEST_MMA("f16");
  }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ Pair from_floats(float x, float y) {
    return __floats2half2_rn(x, y);
  }
};

#undef QUEST_MMA

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const auto pair = Element<T>::from_floats(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Two elements as numbers.
template <typename T>
__device__ __forceinline__ float2 floats_of(uint32_t pair);
template <>
__device__ __forceinline__ float2 floats_of<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 floats_of<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Elementwise minimum and maximum of two words; NaN wins, as in PyTorch.
template <typename T>
__device__ __forceinline__ uint32_t min_pair(uint32_t x, uint32_t y) {
  using Pair = typename Element<T>::Pair;
  const Pair z = __hmin2_nan(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
  return reinterpret_cast<const uint32_t&>(z);
}
template <typename T>
__device__ __forceinline__ uint32_t max_pair(uint32_t x, uint32_t y) {
  using Pair = typename Element<T>::Pair;
  const Pair z = __hmax2_nan(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
  return reinterpret_cast<const uint32_t&>(z);
}

}  // namespace quest::cuda
