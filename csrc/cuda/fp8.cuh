// Caches of fp8 (e4m3): their elements in memory, and as the matrix unit takes them.
//
// Every e4m3 value is an fp16 value, and one instruction converts two (from sm_89 on); none makes
// bf16. So keys and values are multiplied as fp16. The query, in bf16, becomes fp16 as well: each
// head is divided by a power of two, so that its elements have the exponents of fp16. Elements
// below 2^-28 of the head's largest lose bits, which are below the roundings of the fp32 sums.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "device.cuh"

namespace quest::cuda {

using Fp8 = __nv_fp8_e4m3;

template <typename Stored>
constexpr bool kIsFp8 = std::is_same_v<Stored, Fp8>;

// 8 elements.
struct alignas(8) Fp8Vec {
  uint32_t word[2];
};

__device__ __forceinline__ Fp8Vec load_once(const Fp8Vec* address) {
  Fp8Vec v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store(void* address, const Fp8Vec& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1])
               : "memory");
}

// Two words of two fp16 each: the elements in the low half of a word, and those in its high half.
struct Halves {
  uint32_t low, high;
};

// Four elements as fp16; NaN stays.
__device__ __forceinline__ Halves halves_of(uint32_t four) {
  Halves halves;
#if __CUDA_ARCH__ >= 890
  // As halves of a register, which the instruction can read: of `four >> 16`, ptxas 13.0 makes a
  // shift.
  asm("{ .reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(halves.low), "=r"(halves.high)
      : "r"(four));
#else
  // Exponent and mantissa, one place lower, are those of fp16 but for the exponents' bias: 2^8 too
  // small. NaN then looks like 480: times 146 it alone overflows, and infinity times 0 is NaN.
  const auto converted = [](uint32_t spread) {
    const uint32_t bits = (spread & 0x80008000u) | (spread & 0x7f007f00u) >> 1;
    const __half2 x = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f));
    const __half2 y = __hfma2(__hmul2(x, __float2half2_rn(146.0f)), __float2half2_rn(0.0f), x);
    return reinterpret_cast<const uint32_t&>(y);
  };
  halves.low = converted(__byte_perm(four, 0, 0x1404));
  halves.high = converted(__byte_perm(four, 0, 0x3424));
#endif
  return halves;
}

// The largest magnitudes are 448: larger ones become it.
__device__ __forceinline__ uint32_t fp8_of(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

// How a cache's elements lie in memory, eight at a time (Packed), and how they are computed with
// (Vec, of type Compute).
template <typename Stored>
struct CacheElement {
  using Compute = Stored;
  using Packed = Vec;

  static __device__ __forceinline__ Packed load(const Stored* from) { return load_once(from); }
  static __device__ __forceinline__ Vec unpacked(const Packed& elements) { return elements; }
  static __device__ __forceinline__ Packed packed(const Vec& elements) { return elements; }
};

template <>
struct CacheElement<Fp8> {
  using Compute = __half;
  using Packed = Fp8Vec;

  static __device__ __forceinline__ Packed load(const Fp8* from) {
    return load_once(reinterpret_cast<const Fp8Vec*>(from));
  }
  static __device__ __forceinline__ Vec unpacked(const Packed& elements) {
    const Halves first = halves_of(elements.word[0]), second = halves_of(elements.word[1]);
    return {{first.low, first.high, second.low, second.high}};
  }
  static __device__ __forceinline__ Packed packed(const Vec& elements) {
    Packed p;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float2 low = floats_of<__half>(elements.word[2 * w]),
                   high = floats_of<__half>(elements.word[2 * w + 1]);
      p.word[w] = fp8_of(low.x, low.y) | fp8_of(high.x, high.y) << 16;
    }
    return p;
  }
};

// The factors of an fp8 cache's elements. They may be read where the query may. It is a base of the
// classes that use them: without factors it takes no room, and the machine code is as if there were
// none.
template <typename Stored>
class CacheScales {
 public:
  __device__ explicit CacheScales(const KvScales&) {}
  __device__ KvScales scales() const { return {}; }
  __device__ float of_values() const { return 1.0f; }
};

template <>
class CacheScales<Fp8> {
 public:
  __device__ explicit CacheScales(const KvScales& scales) : scales_(scales) {}
  __device__ const KvScales& scales() const { return scales_; }
  __device__ float of_values() const { return *scales_.value; }

 private:
  const KvScales& scales_;
};

// Turn query heads from bf16 into fp16. `kLanes` neighbouring lanes have a head's elements. Returns
// the power of two by which they are divided: with it, the largest lies from 2^14 up to 2^15.
template <int kLanes, int kVecs>
__device__ __forceinline__ float divide_to_halves(Vec (&head)[kVecs]) {
  uint32_t largest = 0;  // bits without sign, in the order of magnitudes
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
#pragma unroll
    for (const uint32_t word : head[j].word) {
      largest = max(largest, max(word & 0x7fffu, word >> 16 & 0x7fffu));
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  }
  // fp32 has the exponents of bf16. The smallest are left, so that both factors are normal numbers.
  constexpr uint32_t kBias = 127, kExponent = 14, kMantissaBits = 23;
  const uint32_t exponent = max(largest >> 7, kExponent + 1);
  const float divisor = __uint_as_float((exponent - kExponent) << kMantissaBits);
  const float factor = __uint_as_float((2 * kBias + kExponent - exponent) << kMantissaBits);
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
#pragma unroll
    for (uint32_t& word : head[j].word) {
      word = pack<__half>(__uint_as_float(word << 16) * factor,
                          __uint_as_float(word & 0xffff0000u) * factor);
    }
  }
  return divisor;
}

}  // namespace quest::cuda
