// score_masses: the share of the attention that each page is estimated to hold, for the rows over
// their budget, from what pages weigh. cluster_decode does the same itself.
//
// Bytes: 4 per page and query head, which L2 still holds.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "masses.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarpSize;
static_assert(kMaxGroupSize <= kWarps);

// Not a template: masses have no dtype.
__global__ void __launch_bounds__(kThreads, 2)
    score_masses_kernel(const __grid_constant__ ScoreCodesParams p) {
  // grid: [CTAs that the GPU holds]; a CTA scores its share of the (row, KV head) pairs.
  extern __shared__ int row_end[];  // [num_rows]
  __shared__ float totals[kMaxGroupSize];
  const int page_size = p.cache.page_size;
  const Schedule schedule = Schedule::build<kThreads>(
      gridDim.x, p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
        return over_budget(p.rows.seq_lens[row], p.rows.budget_pages[row], page_size) ? 1 : 0;
      });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  wait_for_previous_kernel();
  release_next_kernel();

  for (int pair = begin; pair < end; ++pair) {
    const Segment segment = schedule.segment(pair);
    const int seq_len = p.rows.seq_lens[segment.row];
    const PairMasses masses(p.masses, segment.row, segment.head, p.group_size, seq_len, page_size);
    __syncthreads();  // before the totals are overwritten
    if (warp < p.group_size) {
      const float total = masses.total(warp);
      if (lane == 0) totals[warp] = total;
    }
    __syncthreads();
    const int num_pages = div_up(seq_len, page_size);
    float* scores =
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride;
    for (int page = 4 * threadIdx.x; page < num_pages; page += 4 * kThreads) {
      const float4 four = masses.scores(page, totals, masses.load(page, 0));
      scores[page] = four.x;
      if (page + 1 < num_pages) scores[page + 1] = four.y;
      if (page + 2 < num_pages) scores[page + 2] = four.z;
      if (page + 3 < num_pages) scores[page + 3] = four.w;
    }
  }
}

}  // namespace

cudaError_t score_masses(const ScoreCodesParams& params, cudaStream_t stream) {
  const int ctas =
      std::min(params.rows.num_rows * params.cache.num_kv_heads, 2 * num_multiprocessors());
  return launch(score_masses_kernel, ctas, kThreads, params.rows.num_rows * sizeof(int), stream,
                params);
}

}  // namespace quest::cuda
