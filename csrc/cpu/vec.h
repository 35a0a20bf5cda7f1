// Vectors of floats as wide as the instruction set's registers, and the cache's element types.
//
// Everything lies in the namespace of the instruction set, and no std:: function is used: the
// linker keeps one copy of an inline function, and it must not be one that older machines cannot
// run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../params.h"
#include "host.h"

#ifndef QUEST_ISA
#define QUEST_ISA baseline
#endif

namespace quest {
namespace QUEST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

constexpr float kLog2e = 1.44269504f;

template <class T, int kCount>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * kCount)));
};

using Floats = VectorOf<float, kLanes>::Type;
using Ints = VectorOf<int32_t, kLanes>::Type;
using Uints = VectorOf<uint32_t, kLanes>::Type;
using Halves = VectorOf<uint16_t, kLanes>::Type;

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
inline V load_unaligned(const void* memory) {
  V v;
  memcpy(&v, memory, sizeof(v));
  return v;
}

template <class V>
inline void store_unaligned(void* memory, V v) {
  memcpy(memory, &v, sizeof(v));
}

inline Floats broadcast(float x) { return x - Floats{}; }

inline int min_of(int a, int b) { return a < b ? a : b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// A NaN in `a` stays.
inline Floats max_of(Floats a, Floats b) { return a < b ? b : a; }
inline Floats min_of(Floats a, Floats b) { return b < a ? b : a; }
inline float max_of(float a, float b) { return a < b ? b : a; }
inline int max_of(int a, int b) { return a < b ? b : a; }

// Load kLanes elements as floats.
inline Floats load(const float* from) { return load_unaligned<Floats>(from); }

// (A plain conversion of vectors says the same, but GCC 12 makes six instructions of it.)
inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)
  const Uints wide = bit_cast<Uints>(_mm512_cvtepu16_epi32(load_unaligned<__m256i>(from)));
#elif defined(__AVX2__)
  const Uints wide = bit_cast<Uints>(_mm256_cvtepu16_epi32(load_unaligned<__m128i>(from)));
#else
  const Uints wide = __builtin_convertvector(load_unaligned<Halves>(from), Uints);
#endif
  return bit_cast<Floats>(wide << 16);
}

inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_cvtph_ps(load_unaligned<__m256i>(from)));
#elif defined(__AVX2__)
  return bit_cast<Floats>(_mm256_cvtph_ps(load_unaligned<__m128i>(from)));
#else
  // Move the exponent and fraction into place, rebias by a product (exact, subnormals too), then
  // restore infinity and NaN.
  const Uints bits = __builtin_convertvector(load_unaligned<Halves>(from), Uints);
  const Uints sign = (bits & 0x8000u) << 16;
  const Uints magnitude = (bits & 0x7fffu) << 13;
  const Floats rebiased = bit_cast<Floats>(magnitude) * 0x1p112f;
  const Uints special = bit_cast<Uints>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bit_cast<Floats>(bit_cast<Uints>(rebiased) | special | sign);
#endif
}

// Load one element as a float.
template <class T>
inline float load_one(const T* from) {
  const T lanes[kLanes] = {*from};
  return load(lanes)[0];
}

// Store one float, rounded to nearest even.
inline void store(float* to, float x) { *to = x; }

inline void store(BFloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to->bits = static_cast<uint16_t>(x != x ? quiet_nan : rounded);
}

inline void store(Float16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t infinity = 0x7c00u, quiet_nan = 0x7e00u;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = quiet_nan;
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway from the largest fp16 to the next
    half = infinity;
  } else if (magnitude < 0x38800000u) {  // 2^-14: subnormal, in steps of 2^-24 as floats near 0.5
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
    half = (rounded - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// Where lane i of fold<stride>(x, y) comes from, counting y's lanes after x's.
constexpr int fold_source(int i, int stride) {
  const int pair = i / (2 * stride) * (2 * stride), offset = i % (2 * stride);
  return offset < stride ? pair + offset : kLanes + pair + offset - stride;
}

// Of every 2 * stride lanes: x's lower half joined with its upper half, then the same of y.
template <int kStride, class V, class F, int... kLane>
inline V fold(V x, V y, const F& join, std::integer_sequence<int, kLane...>) {
  return join(__builtin_shufflevector(x, y, fold_source(kLane, kStride)...),
              __builtin_shufflevector(x, y, (fold_source(kLane, kStride) + kStride)...));
}

// Join the lanes of each of kCount vectors; what vector i gives ends in lane i * kLanes / kCount.
// Lanes are joined in the same order whatever kCount.
template <int kStride, class V, int kCount, class F>
inline V join_each(const V (&v)[kCount], const F& join) {
  static_assert((kCount & (kCount - 1)) == 0 && kCount <= kLanes, "a power of two, one per lane");
  if constexpr (kStride == 0) {
    return v[0];
  } else {
    constexpr int kFolded = kCount > 1 ? kCount / 2 : 1;
    V folded[kFolded];
    for (int i = 0; i < kFolded; ++i) {
      folded[i] =
          fold<kStride>(v[i], v[i + kCount / 2], join, std::make_integer_sequence<int, kLanes>());
    }
    return join_each<kStride / 2>(folded, join);
  }
}

template <class V, int kCount>
inline V sum_each(const V (&v)[kCount]) {
  return join_each<kLanes / 2>(v, [](V a, V b) { return a + b; });
}

template <int kCount>
inline Floats max_each(const Floats (&v)[kCount]) {
  return join_each<kLanes / 2>(v, [](Floats a, Floats b) { return max_of(a, b); });
}

inline float sum(Floats v) {
  const Floats one[1] = {v};
  return sum_each(one)[0];
}

// 2^x for x <= 0 with relative error below 2e-7; 0 below -126 is 2^-126. NaN stays.
inline Floats exp2_nonpositive(Floats x) {
  x = x < broadcast(-126.0f) ? broadcast(-126.0f) : x;
  const Floats magic = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const Floats shifted = x + magic;
  const Floats fraction = x - (shifted - magic);  // in [-0.5, 0.5]
  Floats p = broadcast(0.00015353359f);
  p = p * fraction + broadcast(0.0013398875f);
  p = p * fraction + broadcast(0.00961843692f);
  p = p * fraction + broadcast(0.0555033237f);
  p = p * fraction + broadcast(0.240226477f);
  p = p * fraction + broadcast(0.693147182f);
  p = p * fraction + broadcast(1.0f);
  const Ints exponent = bit_cast<Ints>(shifted) << 23;
  return bit_cast<Floats>(bit_cast<Ints>(p) + exponent);
}

// The logarithm to base 2 of a normal x > 0, to within 2e-7 of 1 or of itself.
inline Floats log2(Floats x) {
  // x = 2^exponent * m with m from sqrt(1/2) to sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)).
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const Ints bits = bit_cast<Ints>(x);
  const Ints exponent = (bits - kSqrtHalf) >> 23;
  const Floats m = bit_cast<Floats>(bits - (exponent << 23));
  const Floats s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Floats p = broadcast(2 * kLog2e / 9);
  p = p * s2 + 2 * kLog2e / 7;
  p = p * s2 + 2 * kLog2e / 5;
  p = p * s2 + 2 * kLog2e / 3;
  p = p * s2 + 2 * kLog2e;
  return p * s + __builtin_convertvector(exponent, Floats);
}

// tanh through 2^x: with e = 2^(-2|x| log2 e), tanh |x| = (1 - e) / (1 + e).
inline Floats tanh(Floats x) {
  const Floats magnitude = x < Floats{} ? -x : x;
  const Floats e = exp2_nonpositive(magnitude * (-2 * kLog2e));
  const Floats result = (broadcast(1.0f) - e) / (broadcast(1.0f) + e);
  return x < Floats{} ? -result : result;
}

constexpr int kLineBytes = 64;

// Fetches the line of `from` into the second-level cache. Not into the first: it can wait for far
// fewer lines at once (on Zen 4, score over scattered pages took 370 us that way, 260 so).
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Calls body.operator()<T>() with the cache's element type.
template <class F>
inline void with_dtype(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    case DType::kFloat16:
      return body.template operator()<Float16>();
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat8:  // refused, see Checks::cache
      return;
  }
}

// Query heads handled at once: each key converted serves all of them.
constexpr int kMaxHeadTile = 4;

// Calls body.operator()<n>(head) for tiles of n <= kMaxHeadTile heads from `head` on.
template <class F>
inline void for_head_tiles(int group_size, const F& body) {
  int head = 0;
  for (; head + kMaxHeadTile <= group_size; head += kMaxHeadTile) {
    body.template operator()<kMaxHeadTile>(head);
  }
  switch (group_size - head) {
    case 3:
      return body.template operator()<3>(head);
    case 2:
      return body.template operator()<2>(head);
    case 1:
      return body.template operator()<1>(head);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
