// Exact selection of the pages with the highest scores, by all threads of a CTA together. Of two
// equal scores the lower page comes first.
//
// Scores are kept as keys, integers of the same order. A radix select narrows down where the lowest
// chosen key lies, 8 bits at a time, until at most 32 pages are undecided; these are compared one
// with another. Keys count from the lowest of them, so that their upper bits differ: mostly one
// step is enough. More than 32 equal keys are chosen in the order of their pages. What is chosen is
// marked in a bitmap, whose bits are then counted, so that every chosen page knows its place.
//
// What counts is latency: barriers, and instructions. A CTA runs through this code once or twice,
// and waits for it to be fetched: loops are short.
#pragma once

#include "device.cuh"

namespace quest::cuda {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxUndecided = kWarpSize;  // a lane each

// Integers in the order of the scores. +0 and -0 are equal.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The lowest and the highest of some keys.
struct KeyRange {
  uint32_t lowest, highest;

  static __device__ __forceinline__ KeyRange of_none() { return {~0u, 0}; }

  __device__ __forceinline__ void add(const KeyRange& other) {
    lowest = min(lowest, other.lowest);
    highest = max(highest, other.highest);
  }
  __device__ __forceinline__ void add(uint32_t key) { add(KeyRange{key, key}); }

  __device__ __forceinline__ KeyRange of_warp() const {
    return {__reduce_min_sync(kAllLanes, lowest), __reduce_max_sync(kAllLanes, highest)};
  }
};

// A warp looks at 128 pages at a time: lane l at pages l, l + 32, l + 64 and l + 96, so that each
// of four votes fills a word of the bitmap.
constexpr int kGroupWords = 4, kGroupKeys = kGroupWords * kWarpSize;

__host__ __device__ constexpr int key_groups(int num_pages) {
  return (num_pages + kGroupKeys - 1) / kGroupKeys;
}

template <int kThreads>
struct SelectionMemory {
  static constexpr int kWarps = kThreads / kWarpSize;

  int histogram[kBins];
  int counted[kWarps];
  struct {
    int bin, above, count;  // pages in higher bins, and in this one
  } found;
  int num_undecided;
  uint64_t undecided[kMaxUndecided];  // see Selection::value

  // By all threads, before they choose; then they pass a barrier.
  __device__ void clear() {
#pragma unroll 1
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    if (threadIdx.x == 0) num_undecided = 0;
  }
};

// What all threads of a CTA do together. `key(page)` is asked for every page's key several times,
// and for those of pages up to the end of the last group, where it may return anything.
template <int kThreads, typename Key>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;

  // `bitmap`: scratch in shared memory, [key_groups(num_pages)].
  __device__ Selection(SelectionMemory<kThreads>& shared, Key key, uint4* bitmap, int num_pages)
      : shared_(shared),
        key_(key),
        bitmap_(reinterpret_cast<uint32_t*>(bitmap)),
        num_pages_(num_pages),
        words_(key_groups(num_pages) * kGroupWords),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {}

  // Chooses `count` pages, at least one and at most all, and calls f(i, page) for them, in
  // ascending order from i = 0, each by one thread. `range`: of all keys.
  template <typename F>
  __device__ void choose(int count, const KeyRange& range, F f) {
    const Undecided undecided = narrow(count, range);
    mark(undecided);
    __syncthreads();
    if (undecided.is_few) {
      mark_best(undecided.count);
    } else {
      mark_first_equal(undecided);
    }
    __syncthreads();

    // Count the marks before each thread's bytes.
    const auto* bytes = reinterpret_cast<const uint8_t*>(bitmap_);
    int marks = 0;
#pragma unroll 1
    for (int byte = first_byte(); byte < end_byte(); ++byte) marks += __popc(bytes[byte]);
    int i = sum_before(marks);
#pragma unroll 1
    for (int byte = first_byte(); byte < end_byte(); ++byte) {
#pragma unroll 1
      for (uint32_t bits = bytes[byte]; bits != 0; bits &= bits - 1) {
        f(i++, byte * 8 + __ffs(bits) - 1);
      }
    }
  }

 private:
  // Keys from `low` to `high` are undecided: the highest `count` of them are chosen, and all above
  // `high`. If they are not few, `low` is `high`.
  struct Undecided {
    uint32_t low, high;
    int count;
    bool is_few;
  };

  // Integers in the order in which pages are chosen.
  static __device__ uint64_t value(uint32_t key, int page) {
    return uint64_t{key} << 32 | ~static_cast<uint32_t>(page);
  }
  static __device__ int page_of(uint64_t value) { return ~static_cast<uint32_t>(value); }

  // A thread counts the marks of neighbouring bytes, mostly of one.
  __device__ int bytes_of_thread() const { return (words_ * 4 + kThreads - 1) / kThreads; }
  __device__ int first_byte() const { return static_cast<int>(threadIdx.x) * bytes_of_thread(); }
  __device__ int end_byte() const { return min(first_byte() + bytes_of_thread(), words_ * 4); }

  // Narrow down the lowest of the `count` highest keys.
  __device__ Undecided narrow(int count, const KeyRange& range) {
    uint32_t low = range.lowest;
    int bits =
        32 - __clz(range.highest - range.lowest);  // in which undecided keys differ from `low`
#pragma unroll 1
    while (true) {
      const int shift = max(0, bits - kDigitBits);
      for_each_group(
          [&](int, int, const uint32_t (&keys)[kGroupWords], const bool (&exists)[kGroupWords]) {
#pragma unroll
            for (int k = 0; k < kGroupWords; ++k) {
              const uint32_t bin = (keys[k] - low) >> shift;
              if (exists[k] && bin < kBins) atomicAdd(&shared_.histogram[bin], 1);
            }
          });
      __syncthreads();
      find_bin(count);
      __syncthreads();
      const auto found = shared_.found;
      low += static_cast<uint32_t>(found.bin) << shift;
      bits = shift;
      count -= found.above;
      const bool is_few = found.count <= kMaxUndecided;
      if (is_few || shift == 0) return {low, low + ((1u << shift) - 1), count, is_few};
    }
  }

  // Find the bin in which `count` is reached from above, and clear the histogram.
  __device__ void find_bin(int count) {
    static_assert(kBins % kThreads == 0 || kBins < kThreads);
    constexpr int kPerThread = kBins < kThreads ? 1 : kBins / kThreads;
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
    int above = sum_before(sum);
    if (above >= count || above + sum < count) return;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (above < count && above + counts[i] >= count) {
        shared_.found = {highest - i, above, counts[i]};
      }
      above += counts[i];
    }
  }

  // Call f(group, first page of this lane, its keys, which of them exist).
  template <typename F>
  __device__ void for_each_group(F f) const {
#pragma unroll 1
    for (int group = warp_; group < words_ / kGroupWords; group += kWarps) {
      const int first = group * kGroupKeys + lane_;
      uint32_t keys[kGroupWords];
      bool exists[kGroupWords];
#pragma unroll
      for (int k = 0; k < kGroupWords; ++k) {
        keys[k] = key_(first + k * kWarpSize);
        exists[k] = first + k * kWarpSize < num_pages_;
      }
      f(group, first, keys, exists);
    }
  }

  // Mark the pages above the undecided ones, and collect these if they are few.
  __device__ void mark(const Undecided& undecided) {
    for_each_group([&](int group, int first, const uint32_t (&keys)[kGroupWords],
                       const bool (&exists)[kGroupWords]) {
      uint32_t words[kGroupWords];
      bool is_open[kGroupWords];
#pragma unroll
      for (int k = 0; k < kGroupWords; ++k) {
        words[k] = __ballot_sync(kAllLanes, exists[k] && keys[k] > undecided.high);
        is_open[k] = exists[k] && undecided.is_few &&
                     keys[k] - undecided.low <= undecided.high - undecided.low;
      }
      if (lane_ == 0) {
        reinterpret_cast<uint4*>(bitmap_)[group] =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (!(is_open[0] || is_open[1] || is_open[2] || is_open[3])) return;
#pragma unroll
      for (int k = 0; k < kGroupWords; ++k) {
        if (!is_open[k]) continue;
        shared_.undecided[atomicAdd(&shared_.num_undecided, 1)] =
            value(keys[k], first + k * kWarpSize);
      }
    });
  }

  // Mark the best `count` of the undecided pages: a warp compares them, a lane each.
  __device__ void mark_best(int count) {
    if (warp_ != 0) return;
    const int num_undecided = shared_.num_undecided;
    const uint64_t mine = lane_ < num_undecided ? shared_.undecided[lane_] : 0;
    int rank = 0;
#pragma unroll 2
    for (int i = 0; i < num_undecided; ++i) rank += shared_.undecided[i] > mine;
    if (lane_ >= num_undecided || rank >= count) return;
    const int page = page_of(mine);
    atomicOr(bitmap_ + page / kWarpSize, 1u << page % kWarpSize);
  }

  // The same where all undecided pages have one key: mark the first `count` of them.
  __device__ void mark_first_equal(const Undecided& undecided) {
    const int first = first_byte() * 8, end = end_byte() * 8;
    int equal = 0;
#pragma unroll 1
    for (int page = first; page < end; ++page) equal += is_equal(page, undecided.high);
    int ordinal = sum_before(equal);  // of this thread's first one
#pragma unroll 1
    for (int page = first; page < end; ++page) {
      if (!is_equal(page, undecided.high)) continue;
      if (ordinal++ >= undecided.count) return;
      reinterpret_cast<uint8_t*>(bitmap_)[page / 8] |= 1u << page % 8;
    }
  }
  __device__ bool is_equal(int page, uint32_t x) const {
    return page < num_pages_ && key_(page) == x;
  }

  // The sum of x over the threads before this one.
  __device__ int sum_before(int x) {
    int up_to_lane = x;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_lane, step);
      if (lane_ >= step) up_to_lane += below;
    }
    if (lane_ == kWarpSize - 1) shared_.counted[warp_] = up_to_lane;
    __syncthreads();
    return __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.counted[lane_] : 0) + up_to_lane -
           x;
  }

  SelectionMemory<kThreads>& shared_;
  const Key key_;
  uint32_t* const bitmap_;
  const int num_pages_, words_;
  const int lane_, warp_;
};

}  // namespace quest::cuda
