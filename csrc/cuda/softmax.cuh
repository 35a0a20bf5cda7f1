// The algebra of softmax states: how weights of different maxima are brought together.
#pragma once

#include "../softmax_state.h"
#include "device.cuh"

namespace quest::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// The factor of weights relative to `max_log2` when they become relative to `new_max_log2`; 0 where
// there are no weights.
__device__ __forceinline__ float rescale(float max_log2, float new_max_log2) {
  return max_log2 == -INFINITY ? 0.0f : exp2_fast(max_log2 - new_max_log2);
}

// Through L2 alone, as the loads of device.cuh.
__device__ __forceinline__ SoftmaxState load_once(const SoftmaxState* address) {
  SoftmaxState state;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
               : "=f"(state.max_log2), "=f"(state.sum)
               : "l"(address)
               : "memory");
  return state;
}

// The state before any token.
__device__ __forceinline__ SoftmaxState no_tokens() { return {-INFINITY, 0.0f}; }

// Both states' weights, and the factors of the values that belong to either.
struct MergedStates {
  SoftmaxState state;
  float first_factor, second_factor;
};

__device__ __forceinline__ MergedStates merge(const SoftmaxState& first,
                                              const SoftmaxState& second) {
  const float max_log2 = fmaxf(first.max_log2, second.max_log2);
  const float first_factor = rescale(first.max_log2, max_log2);
  const float second_factor = rescale(second.max_log2, max_log2);
  return {{max_log2, first.sum * first_factor + second.sum * second_factor},
          first_factor,
          second_factor};
}

// log2 of all weights.
__device__ __forceinline__ float mass_of(const SoftmaxState& state) {
  return state.max_log2 + log2_fast(state.sum);
}

// The sum of a query head's weights, its sink's included: a logit without a value. `sinks` is
// [num_heads], null for none. A row without tokens keeps the sum 0. The weight of a sink far above
// all logits is infinity, and the output 0.
template <typename T>
__device__ __forceinline__ float sum_with_sink(const SoftmaxState& state, const void* sinks,
                                               int head) {
  if (sinks == nullptr || state.sum == 0.0f) return state.sum;
  const float sink_log2 = static_cast<float>(static_cast<const T*>(sinks)[head]) * kLog2E;
  return state.sum + exp2_fast(sink_log2 - state.max_log2);
}

}  // namespace quest::cuda
