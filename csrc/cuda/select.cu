// select: each KV head's best pages, exactly, for the rows over their budget.
//
// Every page has a value of its own: its score as an integer of the same order, above its number
// counted backwards, so of two equal scores the lower page has the higher value. A radix select
// narrows down where the lowest chosen value lies, 11 bits at a time, until at most 32 pages are
// undecided; these are compared one with another. Scores count from the lowest of them, so that
// their upper bits differ: mostly one step is enough, and few of its counts share a bin.
//
// Bytes: 4 per page and KV head, which the L2 cache still holds. What counts is latency: barriers,
// and instructions. Loops are short, since a CTA runs through them once or twice: longer code waits
// for itself to be fetched.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kThreadsResident = 1024;  // of a multiprocessor: leaves 64 registers each
constexpr int kMaxKeys = 16384;  // that shared memory is asked to keep; more are loaded every time
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxUndecided = kWarpSize;  // a lane each

template <int kThreads>
struct SelectionMemory {
  alignas(16) int histogram[kBins];
  uint32_t lowest[kThreads / kWarpSize], highest[kThreads / kWarpSize];
  int counted[kThreads / kWarpSize];  // in a warp's bins
  struct {
    int bin, above, count;  // pages in higher bins, and in this one
  } found;
  int num_undecided;
  uint64_t undecided[kMaxUndecided];
  int chosen[kThreads / kWarpSize];  // that are decided
};

// Values from `low` and below `high` are undecided: the highest `count` of them are chosen, and all
// from `high`.
struct Undecided {
  uint64_t low, high;
  int count;
};

// What all threads of a CTA do together. They hold pages in the order [warp, group of 32, lane].
template <int kThreads>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;

  // `scores`: [num_pages] in device memory, of which `keys`, shared memory, keeps what it has
  // room for: all, or none.
  __device__ Selection(SelectionMemory<kThreads>& shared, const float* scores, int num_pages,
                       uint32_t* keys, int room)
      : shared_(shared),
        scores_(scores),
        keys_(keys),
        are_kept_(num_pages <= room),
        num_pages_(num_pages),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {
    page_bits_ = 32 - __clz(num_pages - 1);
    const int pages_per_warp = (num_pages + kThreads - 1) / kThreads * kWarpSize;
    first_page_ = min(num_pages, warp_ * pages_per_warp);
    end_page_ = min(num_pages, first_page_ + pages_per_warp);
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) {
      reinterpret_cast<int4*>(shared_.histogram)[i] = {};
    }

    // Find the range of the keys.
    constexpr int kInFlight = 8;
    uint32_t lowest = ~0u, highest = 0;
#pragma unroll 1
    for (int page = first_page_ + lane_; page < end_page_; page += kInFlight * kWarpSize) {
      float score[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        score[k] = load_once(scores_ + min(page + k * kWarpSize, end_page_ - 1));
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const uint32_t key = key_of(score[k]);
        lowest = min(lowest, key);
        highest = max(highest, key);
        if (are_kept_ && page + k * kWarpSize < end_page_) keys_[page + k * kWarpSize] = key;
      }
    }
    lowest = __reduce_min_sync(kAllLanes, lowest);
    highest = __reduce_max_sync(kAllLanes, highest);
    if (lane_ == 0) {
      shared.lowest[warp_] = lowest;
      shared.highest[warp_] = highest;
    }
    __syncthreads();
    lowest_ = __reduce_min_sync(kAllLanes, lane_ < kWarps ? shared.lowest[lane_] : ~0u);
    highest = __reduce_max_sync(kAllLanes, lane_ < kWarps ? shared.highest[lane_] : 0);
    bits_ = 32 - __clz(highest - lowest_) + page_bits_;
  }

  // Narrow down the lowest of the `count` highest values.
  __device__ Undecided narrow(int count) {
    uint64_t prefix = 0;  // of the undecided values, above `bits`
#pragma unroll 1
    for (int bits = bits_;;) {
      const int shift = max(0, bits - kDigitBits);
      const uint64_t first_bin = prefix << (bits - shift);
      const uint64_t num_bins = uint64_t{1} << (bits - shift);
      for_each_page([&](int page, bool is_page) {
        const uint64_t bin = (value(page) >> shift) - first_bin;
        if (is_page && bin < num_bins) atomicAdd(&shared_.histogram[bin], 1);
      });
      __syncthreads();
      find_bin(count);
      __syncthreads();
      const auto found = shared_.found;
      prefix = first_bin + found.bin;
      bits = shift;
      count -= found.above;
      const uint64_t low = prefix << bits, high = (prefix + 1) << bits;
      if (count == found.count) return {low, low, 0};
      if (found.count <= kMaxUndecided) return {low, high, count};
    }
  }

  // Write the chosen pages in ascending order.
  __device__ void write(const Undecided& range, int32_t* pages) {
    // Count those decided, and collect the others.
    int before = 0;
    for_each_page([&](int page, bool is_page) {
      const uint64_t v = value(page);
      before += __popc(__ballot_sync(kAllLanes, is_page && v >= range.high));
      if (is_page && v >= range.low && v < range.high) {
        shared_.undecided[atomicAdd(&shared_.num_undecided, 1)] = v;
      }
    });
    if (lane_ == 0) shared_.chosen[warp_] = before;
    __syncthreads();

    // Each warp decides on all of them, a lane on one, and counts pages that come before its own.
    const int num_undecided = shared_.num_undecided;
    uint64_t lowest_chosen = range.high;
    before = __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.chosen[lane_] : 0);
    if (num_undecided > 0) {
      const uint64_t mine = lane_ < num_undecided ? shared_.undecided[lane_] : 0;
      int rank = 0;
#pragma unroll 4
      for (int i = 0; i < num_undecided; ++i) rank += shared_.undecided[i] > mine;
      const bool is_chosen = lane_ < num_undecided && rank < range.count;
      before += __popc(__ballot_sync(kAllLanes, is_chosen && page_of(mine) < first_page_));
      const unsigned last = __ballot_sync(kAllLanes, is_chosen && rank == range.count - 1);
      lowest_chosen = __shfl_sync(kAllLanes, mine, __ffs(last) - 1);
    }

    const unsigned lanes_below = (1u << lane_) - 1;
    for_each_page([&](int page, bool is_page) {
      const bool is_chosen = is_page && value(page) >= lowest_chosen;
      const unsigned chosen = __ballot_sync(kAllLanes, is_chosen);
      if (is_chosen) pages[before + __popc(chosen & lanes_below)] = page;
      before += __popc(chosen);
    });
  }

 private:
  // Integers in the order of the scores. +0 and -0 are equal.
  static __device__ uint32_t key_of(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  __device__ uint64_t value(int page) const {
    const uint32_t key = are_kept_ ? keys_[page] : key_of(load_once(scores_ + page));
    return uint64_t{key - lowest_} << page_bits_ | static_cast<uint32_t>(num_pages_ - 1 - page);
  }

  __device__ int page_of(uint64_t value) const {
    return num_pages_ - 1 - (static_cast<int>(value) & ((1 << page_bits_) - 1));
  }

  // Calls f(page, is_page) for this lane's pages; a whole warp does so together, and those of its
  // lanes that have no page left see the last with false.
  template <typename F>
  __device__ void for_each_page(F f) const {
#pragma unroll 4
    for (int group = first_page_; group < end_page_; group += kWarpSize) {
      f(min(group + lane_, end_page_ - 1), group + lane_ < end_page_);
    }
  }

  // Find the bin in which `count` is reached from above, and clear the histogram.
  __device__ void find_bin(int count) {
    constexpr int kPerThread = kBins / kThreads;
    static_assert(kPerThread % 4 == 0);
    const int highest = kBins - 1 - threadIdx.x * kPerThread;  // of this thread's bins
    int counts[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      auto* const four = reinterpret_cast<int4*>(shared_.histogram + highest - i - 3);
      const int4 bins = *four;
      *four = {};
      counts[i] = bins.w;
      counts[i + 1] = bins.z;
      counts[i + 2] = bins.y;
      counts[i + 3] = bins.x;
      sum += bins.w + bins.z + bins.y + bins.x;
    }
    int up_to_lane = sum;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_lane, step);
      if (lane_ >= step) up_to_lane += below;
    }
    if (lane_ == kWarpSize - 1) shared_.counted[warp_] = up_to_lane;
    if (threadIdx.x == 0) shared_.num_undecided = 0;
    __syncthreads();
    int above = __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.counted[lane_] : 0);
    above += up_to_lane - sum;
    if (above >= count || above + sum < count) return;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (above < count && above + counts[i] >= count) {
        shared_.found = {highest - i, above, counts[i]};
      }
      above += counts[i];
    }
  }

  SelectionMemory<kThreads>& shared_;
  const float* const scores_;
  uint32_t* const keys_;
  const bool are_kept_;
  const int num_pages_;
  const int lane_, warp_;
  int first_page_, end_page_;  // of this warp
  uint32_t lowest_;            // key
  int page_bits_, bits_;       // of a value's page number, and of all values
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsResident / kThreads)
    select_kernel(const __grid_constant__ SelectParams p, int room) {
  // grid: [CTAs that the GPU holds]; a CTA selects for its share of the (row, KV head) pairs.
  // In shared memory: keys [room], row_end [num_rows].
  extern __shared__ __align__(16) uint32_t keys[];
  __shared__ SelectionMemory<kThreads> shared;
  int* row_end = reinterpret_cast<int*>(keys + room);

  const Schedule schedule = Schedule::build<kThreads>(
      p.num_rows, p.num_kv_heads, row_end,
      [&](int row) { return over_budget(p.seq_lens[row], p.budgets[row], p.page_size) ? 1 : 0; });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  wait_for_previous_kernel();
  release_next_kernel();

  for (int pair = begin; pair < end; ++pair) {
    const Segment segment = schedule.segment(pair);
    const int newest = div_up(p.seq_lens[segment.row], p.page_size) - 1;
    const int budget = p.budgets[segment.row];
    const float* scores =
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride;
    int32_t* pages =
        p.pages + segment.row * p.pages_row_stride + segment.head * p.pages_head_stride;

    // The newest page comes last whatever its score; the others compete.
    if (threadIdx.x == 0) pages[budget - 1] = newest;
    if (budget == 1) continue;
    Selection<kThreads> selection(shared, scores, newest, keys, room);
    selection.write(selection.narrow(budget - 1), pages);
    __syncthreads();  // before the next one's keys and histogram
  }
}

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
  constexpr int kCtas = kThreadsResident / kThreads;  // to each multiprocessor
  static const int shared_bytes = shared_memory_for(select_kernel<kThreads>, kCtas);
  const int rows_bytes = params.num_rows * sizeof(int);
  const int room = std::min<int>(kMaxKeys, (shared_bytes - rows_bytes) / sizeof(uint32_t));
  if (room < 0) return cudaErrorInvalidConfiguration;
  const int ctas = std::min(params.num_rows * params.num_kv_heads, kCtas * num_multiprocessors());
  return launch(select_kernel<kThreads>, ctas, kThreads, room * sizeof(uint32_t) + rows_bytes,
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
