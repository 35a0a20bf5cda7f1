// select: each KV head's best pages, exactly, for the rows over their budget.
//
// The scores become integers of the same order, less the lowest of them: so their upper bits
// differ, and counts of digits spread over shared memory. A radix select finds the lowest chosen
// score, eight bits at a time; then the pages above it, and the first ones equal to it, are written
// in order.
//
// Bytes: 4 per page and KV head, which the L2 cache still holds; some thousand operations a warp.
// What counts is latency: the number of barriers.
#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kPasses = 32 / kDigitBits;
constexpr int kKeptKeys = 16;  // that a thread has registers for

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

// What is known of the lowest chosen key: its upper bits, `prefix` where `mask` is set. All keys
// above are chosen, and of those that agree with it the first `num_equal`.
struct Threshold {
  uint32_t prefix = 0, mask = 0;
  int num_equal;
};

// A digit, the number of keys with a higher one, and of keys with this one.
struct Found {
  int digit, above, equal;
};

// What all threads of a CTA do together. They hold pages in the order [warp, group of 32, lane],
// and keep kKept keys each in registers, or, where it is 0, load any number of them at every pass.
template <int kThreads, int kKept>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;

  struct Shared {
    alignas(16) int histogram[kPasses][kDigits];
    uint32_t lowest[kWarps], highest[kWarps];
    Found found;
    int above[kWarps], equal[kWarps];
  };

  __device__ Selection(Shared& shared, const Keys& keys)
      : shared_(shared),
        keys_(keys),
        groups_(div_up(keys.num_pages, kThreads)),
        first_page_(threadIdx.x / kWarpSize * groups_ * kWarpSize + threadIdx.x % kWarpSize) {
    for (int i = threadIdx.x; i < kPasses * kDigits; i += kThreads) {
      (&shared.histogram[0][0])[i] = 0;
    }
    if constexpr (kKept > 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        kept_[i] = i < groups_ ? keys_.load(first_page_ + i * kWarpSize) : 0;
      }
    }

    // Find the range of the keys.
    uint32_t lowest = ~0u, highest = 0;
    for_each_key([&](uint32_t key, bool is_page) {
      lowest = is_page ? min(lowest, key) : lowest;
      highest = is_page ? max(highest, key) : highest;
    });
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    lowest = __reduce_min_sync(kAllLanes, lowest);
    highest = __reduce_max_sync(kAllLanes, highest);
    if (lane == 0) {
      shared.lowest[warp] = lowest;
      shared.highest[warp] = highest;
    }
    __syncthreads();
    lowest_ = __reduce_min_sync(kAllLanes, lane < kWarps ? shared.lowest[lane] : ~0u);
    highest = __reduce_max_sync(kAllLanes, lane < kWarps ? shared.highest[lane] : 0);
    bits_ = 32 - __clz(highest - lowest_);
  }

  // Find the lowest of the `count` highest keys.
  __device__ Threshold find(int count) {
    Threshold threshold = {.num_equal = count};
    int pass = 0;
    for (int bits = bits_; bits > 0; bits -= kDigitBits) {
      int* histogram = shared_.histogram[pass++];
      const int shift = max(0, bits - kDigitBits);

      // Count the next digit of the keys that agree so far.
      for_each_key([&](uint32_t key, bool is_page) {
        key -= lowest_;
        if (is_page && (key & threshold.mask) == threshold.prefix) {
          atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
        }
      });
      __syncthreads();

      if (threadIdx.x < kWarpSize) find_digit(histogram, threshold.num_equal);
      __syncthreads();
      const Found found = shared_.found;
      threshold.prefix |= static_cast<uint32_t>(found.digit) << shift;
      threshold.mask |= static_cast<uint32_t>(kDigits - 1) << shift;
      threshold.num_equal -= found.above;
      if (threshold.num_equal == found.equal) break;  // all that agree so far are chosen
    }
    return threshold;
  }

  // Write the chosen pages in ascending order.
  __device__ void write(const Threshold& threshold, int32_t* pages) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const unsigned lanes_below = (1u << lane) - 1;

    // Count this warp's chosen pages.
    int above = 0, equal = 0;
    for_each_key([&](uint32_t key, bool is_page) {
      key = (key - lowest_) & threshold.mask;
      above += __popc(__ballot_sync(kAllLanes, is_page && key > threshold.prefix));
      equal += __popc(__ballot_sync(kAllLanes, is_page && key == threshold.prefix));
    });
    if (lane == 0) {
      shared_.above[warp] = above;
      shared_.equal[warp] = equal;
    }
    __syncthreads();

    // Count those of the warps before.
    above = __reduce_add_sync(kAllLanes, lane < warp ? shared_.above[lane] : 0);
    equal = __reduce_add_sync(kAllLanes, lane < warp ? shared_.equal[lane] : 0);

    int page = first_page_;
    for_each_key([&](uint32_t key, bool is_page) {
      key = (key - lowest_) & threshold.mask;
      const bool is_above = is_page && key > threshold.prefix;
      const bool is_equal = is_page && key == threshold.prefix;
      const unsigned all_above = __ballot_sync(kAllLanes, is_above);
      const unsigned all_equal = __ballot_sync(kAllLanes, is_equal);
      const int above_before = above + __popc(all_above & lanes_below);
      const int equal_before = equal + __popc(all_equal & lanes_below);
      if (is_above || (is_equal && equal_before < threshold.num_equal)) {
        pages[above_before + min(equal_before, threshold.num_equal)] = page;
      }
      above += __popc(all_above);
      equal += __popc(all_equal);
      page += kWarpSize;
    });
  }

 private:
  // One warp: find the digit at which `count` is reached from above.
  __device__ void find_digit(const int* histogram, int count) {
    constexpr int kPerLane = kDigits / kWarpSize;
    const int lane = threadIdx.x;
    const int highest = kDigits - 1 - lane * kPerLane;  // of this lane's digits
    int counts[kPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(histogram + highest - i - 3);
      counts[i] = four.w;
      counts[i + 1] = four.z;
      counts[i + 2] = four.y;
      counts[i + 3] = four.x;
      sum += four.w + four.z + four.y + four.x;
    }
    int up_to_lane = sum;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_lane, step);
      if (lane >= step) up_to_lane += below;
    }
    int above = up_to_lane - sum;
    if (above >= count || up_to_lane < count) return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (above < count && above + counts[i] >= count) {
        shared_.found = {highest - i, above, counts[i]};
      }
      above += counts[i];
    }
  }

  // Calls f(key, whether there is such a page) for a lane's keys; whole warps come here together.
  template <typename F>
  __device__ void for_each_key(F f) {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < groups_) f(kept_[i], first_page_ + i * kWarpSize < keys_.num_pages);
      }
    } else {
      constexpr int kInFlight = 8;
      for (int i = 0; i < groups_; i += kInFlight) {
        uint32_t key[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) key[k] = keys_.load(first_page_ + (i + k) * kWarpSize);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (i + k < groups_) f(key[k], first_page_ + (i + k) * kWarpSize < keys_.num_pages);
        }
      }
    }
  }

  Shared& shared_;
  const Keys keys_;
  const int groups_;      // of 32 pages, for each warp
  const int first_page_;  // of this lane; the next is a group further
  uint32_t lowest_;       // key
  int bits_;              // in which keys differ from it
  uint32_t kept_[kKept > 0 ? kKept : 1];
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    select_kernel(const __grid_constant__ SelectParams p) {
  // grid: [CTAs that the GPU holds]; a CTA selects for its share of the (row, KV head) pairs.
  using Kept = Selection<kThreads, kKeptKeys>;
  using Loaded = Selection<kThreads, 0>;
  extern __shared__ int row_end[];
  __shared__ union {
    typename Kept::Shared kept;
    typename Loaded::Shared loaded;
  } shared;

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
    if (budget > 1) {
      if (newest <= kThreads * kKeptKeys) {
        Kept selection(shared.kept, keys);
        selection.write(selection.find(budget - 1), pages);
      } else {
        Loaded selection(shared.loaded, keys);
        selection.write(selection.find(budget - 1), pages);
      }
    }
    __syncthreads();
  }
}

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
  static const int ctas = ctas_per_multiprocessor(select_kernel<kThreads>, kThreads, 0);
  const int64_t pairs = static_cast<int64_t>(params.num_rows) * params.num_kv_heads;
  const int64_t held = static_cast<int64_t>(ctas) * num_multiprocessors();
  return launch(select_kernel<kThreads>, static_cast<int>(pairs < held ? pairs : held), kThreads,
                params.num_rows * sizeof(int), stream, params);
}

}  // namespace

cudaError_t select(const SelectParams& params, cudaStream_t stream) {
  // CTAs as wide as leaves room for one per pair.
  const int pairs = params.num_rows * params.num_kv_heads, sms = num_multiprocessors();
  return pairs <= sms       ? launch_select<1024>(params, stream)
         : pairs <= 2 * sms ? launch_select<512>(params, stream)
                            : launch_select<256>(params, stream);
}

}  // namespace quest::cuda
