// Exact selection of the pages with the highest scores, by all threads of a CTA together. Of two
// equal scores the lower page comes first.
//
// Scores become keys: integers of the same order. A radix select narrows down the lowest chosen
// key, 8 bits at a time, until at most 32 pages are undecided. A warp compares these with one
// another. Keys count from the lowest key, so that their upper bits differ and one step is mostly
// enough. Of more than 32 equal keys, those of the first pages are chosen. Chosen pages are marked
// in a bitmap, and counting its bits gives each chosen page its place in the list.
//
// Latency counts here: barriers, branches and instructions. A CTA runs through this code once or
// twice and waits for its instructions to be fetched, so loops are short. See DESIGN.md,
// "Selection".
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

// The key of a page that does not compete: below those of all scores.
constexpr uint32_t kNoKey = 0;

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

// All bits where x > y, otherwise none: the borrow of y - x. From comparisons, ptxas 13.0 gathered
// predicates of several keys after it had overwritten some. See DESIGN.md, "Marks as borrows".
__device__ __forceinline__ uint32_t all_if_greater(uint32_t x, uint32_t y) {
  uint32_t bits;
  asm("{ .reg .u32 difference;\n"
      "sub.cc.u32 difference, %1, %2;\n"
      "subc.u32 %0, 0, 0; }"
      : "=r"(bits)
      : "r"(y), "r"(x));
  return bits;
}

// A warp reads the keys of 128 pages at a time, a lane those of four neighbouring pages.
constexpr int kLaneKeys = 4, kGroupKeys = kLaneKeys * kWarpSize;

// A bit for each of a lane's keys: whether it is higher, or lower, than `key`.
__device__ __forceinline__ uint32_t higher_keys(const uint4& keys, uint32_t key) {
  return (all_if_greater(keys.x, key) & 1) | (all_if_greater(keys.y, key) & 2) |
         (all_if_greater(keys.z, key) & 4) | (all_if_greater(keys.w, key) & 8);
}
__device__ __forceinline__ uint32_t lower_keys(const uint4& keys, uint32_t key) {
  return (all_if_greater(key, keys.x) & 1) | (all_if_greater(key, keys.y) & 2) |
         (all_if_greater(key, keys.z) & 4) | (all_if_greater(key, keys.w) & 8);
}

__host__ __device__ constexpr int key_groups(int num_pages) {
  return (num_pages + kGroupKeys - 1) / kGroupKeys;
}

template <int kThreads>
struct SelectionMemory {
  static constexpr int kWarps = kThreads / kWarpSize;

  int histogram[kBins + 1];  // The last bin counts keys that are decided.
  int counted[kWarps];
  struct {
    int bin, above, count;  // `above`: pages in higher bins; `count`: pages in this one
  } found;
  int num_undecided;
  uint64_t undecided[kMaxUndecided];  // see Selection::value; 0: none

  // Called by all threads. They pass a barrier before they choose.
  __device__ void clear() {
#pragma unroll 1
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    if (threadIdx.x < kMaxUndecided) undecided[threadIdx.x] = 0;
    if (threadIdx.x == 0) num_undecided = 0;
  }
};

// Selection by all threads of a CTA together. `keys(page)` returns the keys of four pages from
// `page` on, a uint4. It is called several times for each page, up to the end of the last group;
// past the last page it may return anything. Where keys are far, a warp loads those of
// `kGroupsAtOnce` groups at once.
template <int kThreads, typename Keys, int kGroupsAtOnce = 1>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;

  // `bitmap`: scratch in shared memory, [key_groups(num_pages)].
  __device__ Selection(SelectionMemory<kThreads>& memory, Keys keys, uint4* bitmap, int num_pages)
      : memory_(memory),
        keys_(keys),
        bitmap_(reinterpret_cast<uint32_t*>(bitmap)),
        num_pages_(num_pages),
        num_bytes_(key_groups(num_pages) * kGroupKeys / 8),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {}

  // Mark the `count` pages with the highest keys, at least one page. `range` is that of all keys.
  __device__ void choose(int count, const KeyRange& range) {
    const Undecided undecided = narrow(count, range);
    mark(undecided);
    __syncthreads();
    if (undecided.is_few) {
      mark_best(undecided.count);
    } else {
      mark_first_equal(undecided);
    }
    __syncthreads();
  }

  // Mark the first pages too, after choose. Then all threads pass a barrier.
  __device__ void mark_first(int count) {
    for (int page = threadIdx.x; page < count; page += kThreads) {
      atomicOr(bitmap_ + page / kWarpSize, 1u << page % kWarpSize);
    }
  }

  // Remove the mark of a page; returns whether it had one. Called by one thread for each page. Then
  // all threads pass a barrier.
  __device__ bool take(int page) {
    const uint32_t mark = 1u << page % kWarpSize;
    return (atomicAnd(bitmap_ + page / kWarpSize, ~mark) & mark) != 0;
  }

  // Calls f(i, page) for the marked pages, in ascending order from i = 0, each by one thread.
  template <typename F>
  __device__ void list(F f) {
    if (num_bytes_ <= kThreads) {
      list_by<uint8_t>(f);
    } else {
      list_by<uint32_t>(f);
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

  // The neighbouring parts of the bitmap, [first, end), that this thread reads.
  struct Span {
    int first, end;
  };
  static __device__ Span span_of(int num_parts) {
    const int per_thread = (num_parts + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * per_thread;
    return {first, min(first + per_thread, num_parts)};
  }

  // list, where a thread reads neighbouring parts of the bitmap, mostly one.
  template <typename Part, typename F>
  __device__ void list_by(F f) {
    const auto* parts = reinterpret_cast<const Part*>(bitmap_);
    const auto [first, end] = span_of(num_bytes_ / static_cast<int>(sizeof(Part)));
    int marks = 0;
#pragma unroll 1
    for (int part = first; part < end; ++part) marks += __popc(parts[part]);
    int i = sum_before(marks);
#pragma unroll 1
    for (int part = first; part < end; ++part) {
#pragma unroll 1
      for (uint32_t bits = parts[part]; bits != 0; bits &= bits - 1) {
        f(i++, part * static_cast<int>(8 * sizeof(Part)) + __ffs(bits) - 1);
      }
    }
  }

  __device__ uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(bitmap_); }

  // Narrow down the lowest of the `count` highest keys.
  __device__ Undecided narrow(int count, const KeyRange& range) {
    uint32_t low = range.lowest;
    int bits =
        32 - __clz(range.highest - low);  // the bits in which undecided keys can differ from `low`
#pragma unroll 1
    while (true) {
      const int shift = max(0, bits - kDigitBits);
      for_each_group([&](int first, const uint4& four) {
        const uint32_t keys[kLaneKeys] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < kLaneKeys; ++k) {
          const bool is_in = first + k < num_pages_ && keys[k] >= low;
          const uint32_t bin = is_in ? (keys[k] - low) >> shift : kBins;
          atomicAdd(&memory_.histogram[min(bin, uint32_t{kBins})], 1);  // without a branch
        }
      });
      __syncthreads();
      find_bin(count);
      __syncthreads();
      const auto found = memory_.found;
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
    const int highest =
        kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // this thread's highest bin
    int counts[kPerThread] = {}, sum = 0;
    if (highest >= 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        counts[i] = memory_.histogram[highest - i];
        memory_.histogram[highest - i] = 0;
        sum += counts[i];
      }
    }
    int above = sum_before(sum);
    if (above >= count || above + sum < count) return;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (above < count && above + counts[i] >= count) {
        memory_.found = {highest - i, above, counts[i]};
      }
      above += counts[i];
    }
  }

  // Each lane calls f(page, keys) for its four neighbouring pages, from `page` on, of every group.
  template <typename F>
  __device__ void for_each_group(F f) const {
    const auto first_page = [&](int group) { return group * kGroupKeys + lane_ * kLaneKeys; };
    const int num_groups = key_groups(num_pages_);
    if constexpr (kGroupsAtOnce == 1) {
#pragma unroll 2
      for (int group = warp_; group < num_groups; group += kWarps) {
        f(first_page(group), keys_(first_page(group)));
      }
    } else {
#pragma unroll 1
      for (int group = warp_; group < num_groups; group += kGroupsAtOnce * kWarps) {
        uint4 keys[kGroupsAtOnce];
#pragma unroll
        for (int k = 0; k < kGroupsAtOnce; ++k) keys[k] = keys_(first_page(group + k * kWarps));
#pragma unroll
        for (int k = 0; k < kGroupsAtOnce; ++k) {
          if (group + k * kWarps < num_groups) f(first_page(group + k * kWarps), keys[k]);
        }
      }
    }
  }

  // Mark the pages above the undecided ones, and collect these if they are few.
  __device__ void mark(const Undecided& undecided) {
    for_each_group([&](int first, const uint4& keys) {
      // A bit for each page.
      const uint32_t exist = pages_from(first, kLaneKeys);
      const uint32_t marks = exist & higher_keys(keys, undecided.high);
      uint32_t open = exist & ~marks & ~lower_keys(keys, undecided.low);
      const uint32_t of_neighbour = __shfl_xor_sync(kAllLanes, marks, 1);
      if (lane_ % 2 == 0) bytes()[first / 8] = marks | of_neighbour << kLaneKeys;
      if (open == 0 || !undecided.is_few) return;
      int i = atomicAdd(&memory_.num_undecided, __popc(open));
#pragma unroll 1
      for (; open != 0; open &= open - 1) {
        const uint32_t key = open & 1 ? keys.x : open & 2 ? keys.y : open & 4 ? keys.z : keys.w;
        memory_.undecided[i++] = value(key, first + __ffs(open) - 1);
      }
    });
  }

  // Mark the best `count` of the undecided pages: a warp compares them, a lane each.
  __device__ void mark_best(int count) {
    if (warp_ != 0) return;
    constexpr int kCompared = 8;
    const uint64_t mine = memory_.undecided[lane_];
    int rank = 0;
#pragma unroll 1
    for (int first = 0; first < memory_.num_undecided; first += kCompared) {
#pragma unroll
      for (int i = 0; i < kCompared; ++i) rank += memory_.undecided[first + i] > mine;
    }
    if (mine == 0 || rank >= count) return;
    const int page = page_of(mine);
    atomicOr(bitmap_ + page / kWarpSize, 1u << page % kWarpSize);
  }

  // Mark the first `count` of the undecided pages, which all have one key.
  __device__ void mark_first_equal(const Undecided& undecided) {
    const auto [first, end] = span_of(num_bytes_);
    int equal = 0;
#pragma unroll 1
    for (int byte = first; byte < end; ++byte) equal += __popc(pages_with(undecided.high, byte));
    int rest = undecided.count - sum_before(equal);  // pages still to be marked, from here on
#pragma unroll 1
    for (int byte = first; byte < end; ++byte) {
      uint32_t bits = pages_with(undecided.high, byte);
#pragma unroll 1
      for (; bits != 0 && rest > 0; bits &= bits - 1, --rest) bytes()[byte] |= bits & -bits;
    }
  }

  // A bit for each of a byte's pages with this key.
  __device__ uint32_t pages_with(uint32_t key, int byte) const {
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < 8; k += kLaneKeys) {
      const uint4 four = keys_(byte * 8 + k);
      bits |= (~(higher_keys(four, key) | lower_keys(four, key)) & 0xf) << k;
    }
    return bits & pages_from(byte * 8, 8);
  }

  // A bit for each of `count` pages from `first` on: whether it exists.
  __device__ uint32_t pages_from(int first, int count) const {
    return (1u << min(count, max(0, num_pages_ - first))) - 1;
  }

  // The sum of x over the threads before this one.
  __device__ int sum_before(int x) {
    int up_to_lane = x;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, up_to_lane, step);
      if (lane_ >= step) up_to_lane += below;
    }
    if (lane_ == kWarpSize - 1) memory_.counted[warp_] = up_to_lane;
    __syncthreads();
    return __reduce_add_sync(kAllLanes, lane_ < warp_ ? memory_.counted[lane_] : 0) + up_to_lane -
           x;
  }

  SelectionMemory<kThreads>& memory_;
  const Keys keys_;
  uint32_t* const bitmap_;
  const int num_pages_, num_bytes_;
  const int lane_, warp_;
};

}  // namespace quest::cuda
