// What pages weigh, from `weigh_pages`, as scores: see `score_codes` in vllm_quest/ops.py.
#pragma once

#include "../params.h"
#include "device.cuh"
#include "softmax.cuh"

namespace quest::cuda {

// The masses of one row and KV head: those of its query heads, and what is known of the row.
struct PairMasses {
  const float* data;  // [group_size, first_group + groups]
  int64_t head_stride;
  int group_size, first_group;
  int num_groups;  // the last one may not be full
  int num_coded;   // pages of full groups

  __device__ PairMasses(const Masses& masses, int row, int kv_head, int group_size, int seq_len,
                        int page_size)
      : data(masses.data + row * masses.row_stride + kv_head * group_size * masses.head_stride),
        head_stride(masses.head_stride),
        group_size(group_size),
        first_group(masses.first_group),
        num_groups((seq_len + kGroupTokens - 1) / kGroupTokens),
        num_coded(seq_len / kGroupTokens * (kGroupTokens / page_size)) {}

  // What all pages weigh for a query head. Called by a warp; returned in all lanes. The order of
  // the sum depends on the number of groups alone.
  __device__ float total(int head) const {
    constexpr int kLoadsInFlight = 8;
    const float* const groups = data + head * head_stride + first_group;
    const int lane = threadIdx.x % kWarpSize, last_four = (num_groups - 1) / 4 * 4;
    SoftmaxState state = no_tokens();
#pragma unroll 1
    for (int begin = 0; begin < num_groups; begin += kLoadsInFlight * 4 * kWarpSize) {
      float mass[kLoadsInFlight][4];
      float most = state.max_log2;
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        const int first = begin + (k * kWarpSize + lane) * 4;
        const auto* four = reinterpret_cast<const float4*>(groups + min(first, last_four));
        reinterpret_cast<float4&>(mass[k]) = load_once(four);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i >= num_groups) mass[k][i] = -INFINITY;
        }
      }
#pragma unroll
      for (const auto& four : mass) {
#pragma unroll
        for (const float m : four) most = fmaxf(most, m);
      }
      state = {most, state.sum * rescale(state.max_log2, most)};
#pragma unroll
      for (const auto& four : mass) {
#pragma unroll
        for (const float m : four) state.sum += rescale(m, most);
      }
    }
#pragma unroll
    for (int apart = 1; apart < kWarpSize; apart *= 2) {
      const float max_log2 = __shfl_xor_sync(kAllLanes, state.max_log2, apart);
      state = merge(state, {max_log2, __shfl_xor_sync(kAllLanes, state.sum, apart)}).state;
    }
    return mass_of(state);
  }

  // Masses of four pages, by query head.
  static constexpr int kHeadsAtOnce = 4;
  struct Four {
    float4 mass[kHeadsAtOnce];
  };

  // Load those of the pages from `page` on, a multiple of four, for query heads from `head` on; the
  // last head again where there are too few.
  __device__ Four load(int page, int head) const {
    Four four;
#pragma unroll
    for (int k = 0; k < kHeadsAtOnce; ++k) {
      const float* const of_head = data + min(head + k, group_size - 1) * head_stride;
      four.mass[k] = load_once(reinterpret_cast<const float4*>(of_head + page));
    }
    return four;
  }

  // The scores of four pages, each by the query head that it means most to. `totals`: of each query
  // head; `first`: loaded for the first heads.
  __device__ float4 scores(int page, const float* totals, const Four& first) const {
    float4 score = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    Four four = first;
#pragma unroll 1
    for (int head = 0; head < group_size; head += kHeadsAtOnce) {
      if (head > 0) four = load(page, head);
#pragma unroll
      for (int k = 0; k < kHeadsAtOnce; ++k) {
        const float total = totals[min(head + k, group_size - 1)];
        score.x = fmaxf(score.x, four.mass[k].x - total);
        score.y = fmaxf(score.y, four.mass[k].y - total);
        score.z = fmaxf(score.z, four.mass[k].z - total);
        score.w = fmaxf(score.w, four.mass[k].w - total);
      }
    }
    if (page + 3 < num_coded) return score;
    return {score_of(page, score.x), score_of(page + 1, score.y), score_of(page + 2, score.z),
            score_of(page + 3, score.w)};
  }

 private:
  __device__ float score_of(int page, float score) const {
    return page < num_coded ? score : score_without_codes(page);
  }
};

}  // namespace quest::cuda
