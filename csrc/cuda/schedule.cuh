// Deals the work of decode rows to a grid of fixed size, on the device.
//
// A row's work is the same for each of its KV heads: a number of chunks, by its length and budget.
// All chunks of all rows, in the order [row, KV head, chunk], are dealt to the CTAs in contiguous
// parts. The sizes of two parts differ by at most one chunk. The grid depends on the GPU alone.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "rows.cuh"

namespace quest::cuda {

// All chunks of one (row, KV head): numbers [first, first + count) among all chunks.
struct Segment {
  int row, head;
  int first, count;
};

class Schedule {
 public:
  // All threads of a CTA build the schedule together. `row_end` is shared memory of num_rows
  // entries; `chunks_of_row(row)` counts the chunks of one KV head.
  template <int kThreads, typename ChunksOfRow>
  static __device__ Schedule build(int num_ctas, int num_rows, int num_kv_heads, int* row_end,
                                   ChunksOfRow chunks_of_row) {
    static_assert(kThreads % kWarpSize == 0 && kThreads <= kWarpSize * kWarpSize);
    __shared__ int warp_sums[kThreads / kWarpSize];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

    // Count each row's chunks.
    for (int row = threadIdx.x; row < num_rows; row += kThreads) {
      row_end[row] = chunks_of_row(row) * num_kv_heads;
    }
    __syncthreads();

    // Sum up to the end of each row: a thread's rows, then a warp's, then all.
    const int rows_per_thread = div_up(num_rows, kThreads);
    const int begin = min(num_rows, static_cast<int>(threadIdx.x) * rows_per_thread);
    const int end = min(num_rows, begin + rows_per_thread);
    int sum = 0;
    for (int row = begin; row < end; ++row) sum += row_end[row];
    int up_to_lane = sum;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_lane, step);
      if (lane >= step) up_to_lane += below;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = up_to_lane;
    __syncthreads();
    int before_warp = 0, total = 0;
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      before_warp += w < warp ? warp_sums[w] : 0;
      total += warp_sums[w];
    }
    int running = before_warp + up_to_lane - sum;
    for (int row = begin; row < end; ++row) row_end[row] = running += row_end[row];
    __syncthreads();
    return Schedule(num_ctas, row_end, num_rows, num_kv_heads, total);
  }

  // CTA `cta` works on chunks [begin(cta), begin(cta + 1)).
  __device__ int begin(int cta) const {
    cta = min(cta, num_ctas_);
    return cta * per_cta_ + min(cta, with_one_more_);
  }

  // The CTA that works on a chunk.
  __device__ int owner(int chunk) const {
    const int in_larger_parts = with_one_more_ * (per_cta_ + 1);
    return chunk < in_larger_parts ? chunk / (per_cta_ + 1)
                                   : with_one_more_ + (chunk - in_larger_parts) / per_cta_;
  }

  // The segment that a chunk belongs to.
  __device__ Segment segment(int chunk) const {
    int row = 0, high = num_rows_ - 1;  // the first row that ends after `chunk`
    while (row < high) {
      const int middle = (row + high) / 2;
      if (row_end_[middle] > chunk) {
        high = middle;
      } else {
        row = middle + 1;
      }
    }
    const int row_begin = row == 0 ? 0 : row_end_[row - 1];
    const int count = (row_end_[row] - row_begin) / num_kv_heads_;
    const int head = (chunk - row_begin) / count;
    return {row, head, row_begin + head * count, count};
  }

 private:
  __device__ Schedule(int num_ctas, const int* row_end, int num_rows, int num_kv_heads, int total)
      : row_end_(row_end),
        num_rows_(num_rows),
        num_kv_heads_(num_kv_heads),
        num_ctas_(min(num_ctas, total)),
        per_cta_(num_ctas_ == 0 ? 0 : total / num_ctas_),
        with_one_more_(num_ctas_ == 0 ? 0 : total % num_ctas_) {}

  const int* row_end_;  // [num_rows] in shared memory: chunks of this row and those before it
  int num_rows_, num_kv_heads_;
  int num_ctas_;       // CTAs that have work
  int per_cta_;        // chunks in the smaller parts
  int with_one_more_;  // CTAs that have one chunk more
};

}  // namespace quest::cuda
