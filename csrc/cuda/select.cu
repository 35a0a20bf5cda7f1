// select: each KV head's best pages, exactly, for the rows over their budget.
//
// Bytes: 4 per page and KV head, which L2 still holds.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "selection.cuh"

namespace quest::cuda {
namespace {

constexpr int kThreadsPerMultiprocessor = 1024;  // Each thread then has up to 64 registers.
constexpr int kLoadsInFlight = 8;                // loads in flight in each thread
constexpr int kMaxKeys = 16384;  // Shared memory keeps so many keys; more are loaded every time.

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsPerMultiprocessor / kThreads)
    select_kernel(const __grid_constant__ SelectParams p, int room) {
  // grid: [CTAs that the GPU holds]; a CTA selects for its part of the (row, KV head) pairs.
  // In shared memory: keys [room], bitmap [key_groups(max_pages)], row_end [num_rows].
  extern __shared__ __align__(16) uint32_t keys[];
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ SelectionMemory<kThreads> memory;
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
    const int budget_pages = p.budget_pages[segment.row];
    const KeptPages kept = kept_pages(p.kept, budget_pages);
    const float* scores =
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride;
    int32_t* pages =
        p.pages + segment.row * p.pages_row_stride + segment.head * p.pages_head_stride;

    // List the pages that are kept whatever their scores; the others compete.
    for (int i = threadIdx.x; i < kept.first; i += kThreads) pages[i] = i;
    for (int i = threadIdx.x; i < kept.newest; i += kThreads) {
      pages[budget_pages - 1 - i] = num_pages - 1 - i;
    }
    const int num_chosen = budget_pages - kept.first - kept.newest;
    if (num_chosen == 0) continue;
    const int num_competing = num_pages - kept.first - kept.newest;
    scores += kept.first;
    pages += kept.first;

    // Find the range of the competing pages' keys, and keep them.
    const bool keeps_keys = key_groups(num_competing) * kGroupKeys <= room;
    KeyRange range = KeyRange::of_none();
    for (int first = threadIdx.x; first < num_competing; first += kLoadsInFlight * kThreads) {
      float score[kLoadsInFlight];
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        score[k] = load_once(scores + min(first + k * kThreads, num_competing - 1));
      }
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        const uint32_t key = key_of(score[k]);
        range.add(key);
        if (keeps_keys) keys[min(first + k * kThreads, num_competing - 1)] = key;
      }
    }
    range = range.of_warp();
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) ranges[threadIdx.x / kWarpSize] = range;
    memory.clear();
    __syncthreads();
    range = lane < kWarps ? ranges[lane] : KeyRange::of_none();

    const auto key = [&](int page) {
      return key_of(load_once(scores + min(page, num_competing - 1)));
    };
    const auto keys_from = [&](int page) {
      if (keeps_keys) return reinterpret_cast<const uint4*>(keys)[page / kLaneKeys];
      return make_uint4(key(page), key(page + 1), key(page + 2), key(page + 3));
    };
    Selection<kThreads, decltype(keys_from)> selection(memory, keys_from, bitmap, num_competing);
    selection.choose(num_chosen, range.of_warp());
    selection.list([&](int i, int page) { pages[i] = kept.first + page; });
    __syncthreads();  // before the next one's keys and counts
  }
}

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
  constexpr int kCtasPerMultiprocessor = kThreadsPerMultiprocessor / kThreads;
  static const int shared_bytes =
      shared_memory_for(select_kernel<kThreads>, kCtasPerMultiprocessor);
  const int other_bytes =
      key_groups(params.max_pages) * sizeof(uint4) + params.num_rows * sizeof(int);
  const int free = std::min<int>(kMaxKeys, (shared_bytes - other_bytes) / int{sizeof(uint32_t)});
  if (free < 0) return cudaErrorInvalidConfiguration;
  const int room = free / kGroupKeys * kGroupKeys;
  const int ctas = std::min(params.num_rows * params.num_kv_heads,
                            kCtasPerMultiprocessor * num_multiprocessors());
  return launch(select_kernel<kThreads>, ctas, kThreads, room * sizeof(uint32_t) + other_bytes,
                stream, params, room);
}

}  // namespace

cudaError_t select(const SelectParams& params, cudaStream_t stream) {
  // Use large CTAs where the GPU holds one for each (row, KV head).
  constexpr int kLarge = 512, kSmall = 256;
  const int held = kThreadsPerMultiprocessor / kLarge * num_multiprocessors();
  return params.num_rows * params.num_kv_heads <= held ? launch_select<kLarge>(params, stream)
                                                       : launch_select<kSmall>(params, stream);
}

}  // namespace quest::cuda
