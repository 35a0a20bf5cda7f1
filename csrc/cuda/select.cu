// select: each KV head's best pages, exactly, for the rows over their budget.
//
// Bytes: 4 per page and KV head, which the L2 cache still holds.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "selection.cuh"

namespace quest::cuda {
namespace {

constexpr int kThreadsResident = 1024;  // of a multiprocessor: leaves 64 registers each
constexpr int kLoads = 8;               // of a thread, in flight
constexpr int kMaxKeys = 16384;  // that shared memory is asked to keep; more are loaded every time

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsResident / kThreads)
    select_kernel(const __grid_constant__ SelectParams p, int room) {
  // grid: [CTAs that the GPU holds]; a CTA selects for its share of the (row, KV head) pairs.
  // In shared memory: keys [room], bitmap [key_groups(max_pages)], row_end [num_rows].
  extern __shared__ __align__(16) uint32_t keys[];
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ SelectionMemory<kThreads> shared;
  __shared__ KeyRange ranges[kWarps];
  uint4* bitmap = reinterpret_cast<uint4*>(keys + room);
  int* row_end = reinterpret_cast<int*>(bitmap + key_groups(p.max_pages));

  const Schedule schedule =
      Schedule::build<kThreads>(gridDim.x, p.num_rows, p.num_kv_heads, row_end, [&](int row) {
        return over_budget(p.seq_lens[row], p.budget_pages[row], p.page_size) ? 1 : 0;
      });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  wait_for_previous_kernel();
  release_next_kernel();

  for (int pair = begin; pair < end; ++pair) {
    const Segment segment = schedule.segment(pair);
    const int num_pages = div_up(p.seq_lens[segment.row], p.page_size);
    const int budget = p.budget_pages[segment.row];
    const KeptPages kept = kept_pages(p.kept, budget);
    const float* scores =
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride;
    int32_t* pages =
        p.pages + segment.row * p.pages_row_stride + segment.head * p.pages_head_stride;

    // List the pages that are kept whatever their scores; the others compete.
    const int selected = budget - kept.first - kept.newest;
    for (int i = threadIdx.x; i < kept.first; i += kThreads) pages[i] = i;
    for (int i = threadIdx.x; i < kept.newest; i += kThreads) {
      pages[budget - 1 - i] = num_pages - 1 - i;
    }
    if (selected == 0) continue;
    const int num_competing = num_pages - kept.first - kept.newest;
    scores += kept.first;
    pages += kept.first;

    // Find the range of the competing pages' keys, and keep them.
    const bool keeps_keys = key_groups(num_competing) * kGroupKeys <= room;
    KeyRange range = KeyRange::of_none();
    for (int first = threadIdx.x; first < num_competing; first += kLoads * kThreads) {
      float score[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        score[k] = load_once(scores + min(first + k * kThreads, num_competing - 1));
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const uint32_t key = key_of(score[k]);
        range.add(key);
        if (keeps_keys) keys[min(first + k * kThreads, num_competing - 1)] = key;
      }
    }
    range = range.of_warp();
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) ranges[threadIdx.x / kWarpSize] = range;
    shared.clear();
    __syncthreads();
    range = lane < kWarps ? ranges[lane] : KeyRange::of_none();

    const auto key = [&](int page) {
      return key_of(load_once(scores + min(page, num_competing - 1)));
    };
    const auto keys_from = [&](int page) {
      if (keeps_keys) return reinterpret_cast<const uint4*>(keys)[page / kLaneKeys];
      return make_uint4(key(page), key(page + 1), key(page + 2), key(page + 3));
    };
    Selection<kThreads, decltype(keys_from)> selection(shared, keys_from, bitmap, num_competing);
    selection.choose(selected, range.of_warp());
    selection.list([&](int i, int page) { pages[i] = kept.first + page; });
    __syncthreads();  // before the next one's keys and counts
  }
}

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
  constexpr int kCtas = kThreadsResident / kThreads;  // to each multiprocessor
  static const int shared_bytes = shared_memory_for(select_kernel<kThreads>, kCtas);
  const int other_bytes =
      key_groups(params.max_pages) * sizeof(uint4) + params.num_rows * sizeof(int);
  const int free = std::min<int>(kMaxKeys, (shared_bytes - other_bytes) / int{sizeof(uint32_t)});
  if (free < 0) return cudaErrorInvalidConfiguration;
  const int room = free / kGroupKeys * kGroupKeys;
  const int ctas = std::min(params.num_rows * params.num_kv_heads, kCtas * num_multiprocessors());
  return launch(select_kernel<kThreads>, ctas, kThreads, room * sizeof(uint32_t) + other_bytes,
                stream, params, room);
}

}  // namespace

cudaError_t select(const SelectParams& params, cudaStream_t stream) {
  // CTAs as wide as leaves room for one per pair.
  constexpr int kWide = 512, kNarrow = 256;
  const int wide_held = kThreadsResident / kWide * num_multiprocessors();
  return params.num_rows * params.num_kv_heads <= wide_held
             ? launch_select<kWide>(params, stream)
             : launch_select<kNarrow>(params, stream);
}

}  // namespace quest::cuda
