// Exact selection of the pages with the highest scores, by all threads of a CTA together. Of two
// equal scores the lower page comes first.
//
// Scores become keys, integers of the same order. A radix select narrows down where the lowest
// chosen key lies, 8 bits at a time, until at most 32 pages are undecided; these are compared one
// with another. Keys count from the lowest of them, so that their upper bits differ: mostly one
// step is enough. More than 32 equal keys are chosen in the order of their pages.
//
// What counts is latency: barriers, and instructions. Loops are short, since a CTA runs through
// them once or twice: longer code waits for itself to be fetched.
#pragma once

#include "device.cuh"

namespace quest::cuda {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxUndecided = kWarpSize;  // a lane each

template <int kThreads>
struct SelectionMemory {
  static constexpr int kWarps = kThreads / kWarpSize;

  int histogram[kBins];
  uint32_t lowest[kWarps], highest[kWarps];
  int counted[kWarps];  // in a warp's bins
  struct {
    int bin, above, count;  // pages in higher bins, and in this one
  } found;
  int num_undecided;
  uint64_t undecided[kMaxUndecided];   // see Selection::value
  int decided[kWarps], equal[kWarps];  // pages of a warp
  int last_equal;
};

// Keys from `low` to `high` are undecided: the highest `count` of them are chosen, and all above
// `high`. They number `num_undecided`; if more than kMaxUndecided, `low` is `high`.
struct Undecided {
  uint32_t low, high;
  int count, num_undecided;
};

// What all threads of a CTA do together. A warp has a run of pages, in blocks of which each lane
// has 8 neighbours.
template <int kThreads>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kNeighbours = 8, kBlock = kNeighbours * kWarpSize;

  // `scores`: [num_pages] in device memory. `keys`, shared memory, aligned to 16 bytes, keeps all
  // of them if it has room for as many blocks.
  __device__ Selection(SelectionMemory<kThreads>& shared, const float* scores, int num_pages,
                       uint32_t* keys, int room)
      : shared_(shared),
        scores_(scores),
        keys_(keys),
        are_kept_((num_pages + kBlock - 1) / kBlock * kBlock <= room),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {
    const int blocks = (num_pages + kBlock * kWarps - 1) / (kBlock * kWarps);  // of a warp
    first_page_ = min(num_pages, warp_ * blocks * kBlock);
    end_page_ = min(num_pages, first_page_ + blocks * kBlock);
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared_.histogram[bin] = 0;
    if (threadIdx.x == 0) shared_.num_undecided = 0;

    // Find the range of the keys.
    uint32_t lowest = ~0u, highest = 0;
#pragma unroll 1
    for (int first = first_page_; first < end_page_; first += kBlock) {
      float score[kNeighbours];
#pragma unroll
      for (int k = 0; k < kNeighbours; ++k) {
        score[k] = load_once(scores_ + min(first + k * kWarpSize + lane_, end_page_ - 1));
      }
#pragma unroll
      for (int k = 0; k < kNeighbours; ++k) {
        const uint32_t key = key_of(score[k]);
        lowest = min(lowest, key);
        highest = max(highest, key);
        if (are_kept_) keys_[first + k * kWarpSize + lane_] = key;
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
    highest_ = __reduce_max_sync(kAllLanes, lane_ < kWarps ? shared.highest[lane_] : 0);
  }

  // Narrow down the lowest of the `count` highest keys.
  __device__ Undecided narrow(int count) {
    uint32_t low = lowest_;
    int bits = 32 - __clz(highest_ - lowest_);  // in which undecided keys differ from `low`
#pragma unroll 1
    while (true) {
      const int shift = max(0, bits - kDigitBits);
      for_each_block([&](int page, const uint32_t (&keys)[kNeighbours]) {
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) {
          const uint32_t bin = (keys[k] - low) >> shift;
          if (page + k < end_page_ && bin < kBins) atomicAdd(&shared_.histogram[bin], 1);
        }
      });
      __syncthreads();
      find_bin(count);
      __syncthreads();
      const auto found = shared_.found;
      low += static_cast<uint32_t>(found.bin) << shift;
      bits = shift;
      count -= found.above;
      const uint32_t high = low + ((1u << shift) - 1);
      if (found.count <= kMaxUndecided || shift == 0) return {low, high, count, found.count};
    }
  }

  // Calls f(i, page) for the chosen pages, in ascending order from i = 0, each by one thread.
  template <typename F>
  __device__ void for_each_chosen(const Undecided& range, F f) {
    Last last;
    int before = range.num_undecided <= kMaxUndecided ? decide_on_few(range, last)
                                                      : decide_on_equal(range, last);
    for_each_block([&](int page, const uint32_t (&keys)[kNeighbours]) {
      const unsigned chosen = mask(page, [&](int k) {
        return keys[k] > last.key || (keys[k] == last.key && page + k <= last.page);
      });
      const int up_to_lane = sum_up_to_lane(__popc(chosen));
      int i = before + up_to_lane - __popc(chosen);
      before += __shfl_sync(kAllLanes, up_to_lane, kWarpSize - 1);
      for (unsigned left = chosen; left != 0; left &= left - 1) f(i++, page + __ffs(left) - 1);
    });
  }

 private:
  // Integers in the order of the scores. +0 and -0 are equal.
  static __device__ uint32_t key_of(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  // Integers in the order in which pages are chosen.
  static __device__ uint64_t value(uint32_t key, int page) {
    return uint64_t{key} << 32 | ~static_cast<uint32_t>(page);
  }
  static __device__ int page_of(uint64_t value) { return ~static_cast<uint32_t>(value); }

  // Calls f(page, keys) for this lane's pages, 8 from `page` on; those from end_page_ on do not
  // exist. All lanes of a warp do so together.
  template <typename F>
  __device__ void for_each_block(F f) const {
#pragma unroll 1
    for (int first = first_page_; first < end_page_; first += kBlock) {
      const int page = first + lane_ * kNeighbours;
      uint32_t keys[kNeighbours];
      if (are_kept_) {
#pragma unroll
        for (int k = 0; k < kNeighbours; k += 4) {
          const uint4 four = *reinterpret_cast<const uint4*>(keys_ + page + k);
          keys[k] = four.x;
          keys[k + 1] = four.y;
          keys[k + 2] = four.z;
          keys[k + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) {
          keys[k] = key_of(load_once(scores_ + min(page + k, end_page_ - 1)));
        }
      }
      f(page, keys);
    }
  }

  // Those of the 8 pages from `page` on that exist and for which is_in(k) holds, a bit each.
  template <typename IsIn>
  __device__ unsigned mask(int page, IsIn is_in) const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kNeighbours; ++k) bits |= static_cast<unsigned>(is_in(k)) << k;
    const int existing = min(max(end_page_ - page, 0), kNeighbours);
    return bits & ((1u << existing) - 1);
  }

  __device__ uint32_t key(int page) const {
    return are_kept_ ? keys_[page] : key_of(load_once(scores_ + page));
  }

  __device__ int sum_up_to_lane(int x) const {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, x, step);
      if (lane_ >= step) x += below;
    }
    return x;
  }

  // Of the chosen pages, that with the lowest key; of equal ones, the last.
  struct Last {
    uint32_t key;
    int page;
  };

  // Compare the undecided pages with one another. Returns how many are chosen before this warp's.
  __device__ int decide_on_few(const Undecided& range, Last& last) {
    int decided = 0;
    for_each_block([&](int page, const uint32_t (&keys)[kNeighbours]) {
      decided += __popc(mask(page, [&](int k) { return keys[k] > range.high; }));
      unsigned open =
          mask(page, [&](int k) { return keys[k] - range.low <= range.high - range.low; });
      for (; open != 0; open &= open - 1) {
        const int k = __ffs(open) - 1;
        shared_.undecided[atomicAdd(&shared_.num_undecided, 1)] = value(key(page + k), page + k);
      }
    });
    decided = __reduce_add_sync(kAllLanes, decided);
    if (lane_ == 0) shared_.decided[warp_] = decided;
    __syncthreads();

    // Each warp decides on all of them, a lane on one.
    const uint64_t mine = lane_ < range.num_undecided ? shared_.undecided[lane_] : 0;
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < range.num_undecided; ++i) rank += shared_.undecided[i] > mine;
    const bool is_chosen = lane_ < range.num_undecided && rank < range.count;
    const unsigned is_last = __ballot_sync(kAllLanes, is_chosen && rank == range.count - 1);
    const uint64_t lowest = __shfl_sync(kAllLanes, mine, __ffs(is_last) - 1);
    last = {static_cast<uint32_t>(lowest >> 32), page_of(lowest)};
    return __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.decided[lane_] : 0) +
           __popc(__ballot_sync(kAllLanes, is_chosen && page_of(mine) < first_page_));
  }

  // The same where all undecided pages have one key: the first of them are chosen.
  __device__ int decide_on_equal(const Undecided& range, Last& last) {
    int decided = 0, equal = 0;
    for_each_block([&](int page, const uint32_t (&keys)[kNeighbours]) {
      decided += __popc(mask(page, [&](int k) { return keys[k] > range.high; }));
      equal += __popc(mask(page, [&](int k) { return keys[k] == range.high; }));
    });
    decided = __reduce_add_sync(kAllLanes, decided);
    equal = __reduce_add_sync(kAllLanes, equal);
    if (lane_ == 0) {
      shared_.decided[warp_] = decided;
      shared_.equal[warp_] = equal;
    }
    __syncthreads();
    const int before = __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.decided[lane_] : 0);
    const int equal_before = __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.equal[lane_] : 0);
    int ordinal = equal_before;  // of the next one
    for_each_block([&](int page, const uint32_t (&keys)[kNeighbours]) {
      unsigned equals = mask(page, [&](int k) { return keys[k] == range.high; });
      const int up_to_lane = sum_up_to_lane(__popc(equals));
      int mine = ordinal + up_to_lane - __popc(equals);
      for (; equals != 0; equals &= equals - 1) {
        if (mine++ == range.count - 1) shared_.last_equal = page + __ffs(equals) - 1;
      }
      ordinal += __shfl_sync(kAllLanes, up_to_lane, kWarpSize - 1);
    });
    __syncthreads();
    last = {range.high, shared_.last_equal};
    return before + min(equal_before, range.count);
  }

  // Find the bin in which `count` is reached from above, and clear the histogram.
  __device__ void find_bin(int count) {
    constexpr int kPerThread = (kBins + kThreads - 1) / kThreads;
    const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // of its bins
    int counts[kPerThread] = {}, sum = 0;
    if (highest >= 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        counts[i] = shared_.histogram[highest - i];
        shared_.histogram[highest - i] = 0;
        sum += counts[i];
      }
    }
    const int up_to_lane = sum_up_to_lane(sum);
    if (lane_ == kWarpSize - 1) shared_.counted[warp_] = up_to_lane;
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
  const int lane_, warp_;
  int first_page_, end_page_;  // of this warp
  uint32_t lowest_, highest_;  // of all keys
};

}  // namespace quest::cuda
