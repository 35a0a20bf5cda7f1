// select: each KV head's best pages, exactly, for the rows over their budget.
//
// Every page has a value of its own: its score as an integer of the same order, above its number
// counted backwards, so of two equal scores the lower page has the higher value. A radix select
// narrows down where the lowest chosen value lies, 11 bits at a time, until at most 32 pages are
// undecided; these are compared one with another. Scores count from the lowest of them, so that
// their upper bits differ: mostly one step is enough, and few of its counts share a bin.
//
// Bytes: 4 per page and KV head, which the L2 cache still holds. What counts is latency: barriers,
// and the instructions between them.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kKeptKeys = 16;             // that a thread has registers for
constexpr int kThreadsResident = 1024;    // of a multiprocessor: leaves 64 registers each
constexpr int kMaxUndecided = kWarpSize;  // a lane each

struct Keys {
  const float* scores;
  int num_pages;  // to choose from

  // Integers in the order of the scores. +0 and -0 are equal.
  __device__ uint32_t load(int page) const {
    if (page >= num_pages) return 0;
    const uint32_t bits = __float_as_uint(load_once(scores + page) + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
};

template <int kThreads>
struct Shared {
  alignas(16) int histogram[kBins];  // 0 but between counting and reading
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

// What all threads of a CTA do together. They hold pages in the order [warp, group of 32, lane],
// and keep kKept keys each in registers, or, where it is 0, load any number of them at every pass.
template <int kThreads, int kKept>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;

  __device__ Selection(Shared<kThreads>& shared, const Keys& keys)
      : shared_(shared),
        keys_(keys),
        groups_(div_up(keys.num_pages, kThreads)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        first_page_(warp_ * groups_ * kWarpSize) {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        kept_[i] = i < groups_ ? keys_.load(first_page_ + i * kWarpSize + lane_) : 0;
      }
    }

    // Find the range of the keys.
    uint32_t lowest = ~0u, highest = 0;
    for_each_key([&](uint32_t key, int page) {
      lowest = is_page(page) ? min(lowest, key) : lowest;
      highest = max(highest, key);
    });
    lowest = __reduce_min_sync(kAllLanes, lowest);
    highest = __reduce_max_sync(kAllLanes, highest);
    if (lane_ == 0) {
      shared.lowest[warp_] = lowest;
      shared.highest[warp_] = highest;
    }
    __syncthreads();
    lowest_ = __reduce_min_sync(kAllLanes, lane_ < kWarps ? shared.lowest[lane_] : ~0u);
    highest = __reduce_max_sync(kAllLanes, lane_ < kWarps ? shared.highest[lane_] : 0);
    page_bits_ = 32 - __clz(keys.num_pages - 1);
    bits_ = 32 - __clz(highest - lowest_) + page_bits_;
  }

  // Narrow down the lowest of the `count` highest values.
  __device__ Undecided narrow(int count) {
    uint64_t prefix = 0;  // of the undecided values, above `bits`
    for (int bits = bits_;;) {
      const int shift = max(0, bits - kDigitBits);
      const uint64_t first_bin = prefix << (bits - shift);
      const uint64_t num_bins = uint64_t{1} << (bits - shift);
      for_each_key([&](uint32_t key, int page) {
        const uint64_t bin = (value(key, page) >> shift) - first_bin;
        if (is_page(page) && bin < num_bins) atomicAdd(&shared_.histogram[bin], 1);
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
    for_each_key([&](uint32_t key, int page) {
      const uint64_t v = value(key, page);
      before += __popc(__ballot_sync(kAllLanes, is_page(page) && v >= range.high));
      if (is_page(page) && v >= range.low && v < range.high) {
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
      for (int i = 0; i < num_undecided; ++i) rank += shared_.undecided[i] > mine;
      const bool is_chosen = lane_ < num_undecided && rank < range.count;
      before += __popc(__ballot_sync(kAllLanes, is_chosen && page_of(mine) < first_page_));
      const unsigned last = __ballot_sync(kAllLanes, is_chosen && rank == range.count - 1);
      lowest_chosen = __shfl_sync(kAllLanes, mine, __ffs(last) - 1);
    }

    const unsigned lanes_below = (1u << lane_) - 1;
    for_each_key([&](uint32_t key, int page) {
      const bool is_chosen = is_page(page) && value(key, page) >= lowest_chosen;
      const unsigned chosen = __ballot_sync(kAllLanes, is_chosen);
      if (is_chosen) pages[before + __popc(chosen & lanes_below)] = page;
      before += __popc(chosen);
    });
  }

 private:
  __device__ bool is_page(int page) const { return page < keys_.num_pages; }

  __device__ uint64_t value(uint32_t key, int page) const {
    return uint64_t{key - lowest_} << page_bits_ |
           static_cast<uint32_t>(keys_.num_pages - 1 - page);
  }

  __device__ int page_of(uint64_t value) const {
    return keys_.num_pages - 1 - (static_cast<int>(value) & ((1 << page_bits_) - 1));
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

  // Calls f(key, page) for a lane's keys, and pages past the last; a whole warp does so together.
  template <typename F>
  __device__ void for_each_key(F f) {
    const int first = first_page_ + lane_;
    if constexpr (kKept > 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < groups_) f(kept_[i], first + i * kWarpSize);
      }
    } else {
      constexpr int kInFlight = 8;
      for (int i = 0; i < groups_; i += kInFlight) {
        uint32_t key[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) key[k] = keys_.load(first + (i + k) * kWarpSize);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (i + k < groups_) f(key[k], first + (i + k) * kWarpSize);
        }
      }
    }
  }

  Shared<kThreads>& shared_;
  const Keys keys_;
  const int groups_;  // of 32 pages, for each warp
  const int lane_, warp_;
  const int first_page_;  // of this warp
  uint32_t lowest_;       // key
  int page_bits_;         // of a value
  int bits_;              // of all values
  uint32_t kept_[kKept > 0 ? kKept : 1];
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsResident / kThreads)
    select_kernel(const __grid_constant__ SelectParams p) {
  // grid: [CTAs that the GPU holds]; a CTA selects for its share of the (row, KV head) pairs.
  extern __shared__ int row_end[];
  __shared__ Shared<kThreads> shared;

  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
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
    const Keys keys = {
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride, newest};
    int32_t* pages =
        p.pages + segment.row * p.pages_row_stride + segment.head * p.pages_head_stride;

    // The newest page comes last whatever its score; the others compete.
    if (threadIdx.x == 0) pages[budget - 1] = newest;
    if (budget == 1) continue;
    if (newest <= kThreads * kKeptKeys) {
      Selection<kThreads, kKeptKeys> selection(shared, keys);
      selection.write(selection.narrow(budget - 1), pages);
    } else {
      Selection<kThreads, 0> selection(shared, keys);
      selection.write(selection.narrow(budget - 1), pages);
    }
  }
}

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
  const int held = kThreadsResident / kThreads * num_multiprocessors();
  return launch(select_kernel<kThreads>, std::min(params.num_rows * params.num_kv_heads, held),
                kThreads, params.num_rows * sizeof(int), stream, params);
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
