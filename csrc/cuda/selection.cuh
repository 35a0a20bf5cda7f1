// Exact selection of the pages with the highest scores, by all threads of a CTA, or of a cluster of
// CTAs, together. Of two equal scores the lower page comes first.
//
// Scores become keys, integers of the same order, which each CTA keeps in shared memory for its
// pages. A radix select narrows down where the lowest chosen key lies, 8 bits at a time, until at
// most 32 pages are undecided; these are compared one with another. Keys count from the lowest of
// them, so that their upper bits differ: mostly one step is enough. More than 32 equal keys are
// narrowed down by their pages.
//
// What counts is latency: barriers, and instructions. Loops are short, since a CTA runs through
// them once or twice.
#pragma once

#include "cluster.cuh"
#include "device.cuh"
#include "rows.cuh"

namespace quest::cuda {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxUndecided = kWarpSize;  // a lane each
constexpr int kPageTile = 16;             // pages that one CTA has before the next one's

template <int kThreads>
struct SelectionMemory {
  static constexpr int kWarps = kThreads / kWarpSize;

  // Of all warps of the cluster: the range of their keys, and how many of their pages are decided.
  uint2 range[kMaxClusterCtas * kWarps];
  int decided[kMaxClusterCtas * kWarps];
  uint64_t undecided[kMaxUndecided];  // of all CTAs, see Selection::value
  int num_undecided;

  int histogram[2][kBins];  // of this CTA's keys; two, since others read one while the next is made
  int counted[kWarps];      // in a warp's bins
  struct {
    int bin, above, count;  // pages in higher bins, and in this one
  } found;
};

// Values from `low` to `high` are undecided: the highest `count` of them are chosen, and all above.
struct Undecided {
  uint64_t low, high;
  int count, num_undecided;
};

// Pages are dealt to the CTAs 16 at a time. Slots number those of a CTA; a warp has a run of them,
// in blocks of which each lane has 4 neighbours.
template <int kThreads>
class Selection {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kNeighbours = 4, kBlock = kNeighbours * kWarpSize;

  // `scores`: [num_pages] in device memory. `keys`: [room], in shared memory, at a multiple of 16
  // bytes. If it has too little room for this CTA's pages, their scores are read each time.
  __device__ Selection(SelectionMemory<kThreads>& shared, const float* scores, int num_pages,
                       uint32_t* keys, int room, int log2_ctas, int rank)
      : shared_(shared),
        scores_(scores),
        keys_(keys),
        num_pages_(num_pages),
        log2_ctas_(log2_ctas),
        rank_(rank),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize) {
    const int tiles = div_up(num_pages, kPageTile);
    const int most_slots = div_up(tiles, ctas()) * kPageTile;  // that a CTA has
    are_kept_ = div_up(most_slots, kBlock) * kBlock <= room;
    slots_per_warp_ = div_up(most_slots, kBlock * kWarps) * kBlock;
    const int our_tiles = (tiles - rank + ctas() - 1) >> log2_ctas;
    const bool has_last = our_tiles > 0 && ((tiles - 1) & (ctas() - 1)) == rank;
    num_slots_ = our_tiles * kPageTile - (has_last ? tiles * kPageTile - num_pages : 0);
  }

  // Before the first use of its memory, and again before each further one: all threads, and a
  // barrier before others of the cluster write there.
  static __device__ void clear(SelectionMemory<kThreads>& shared) {
    for (int bin = threadIdx.x; bin < 2 * kBins; bin += kThreads) shared.histogram[0][bin] = 0;
    if (threadIdx.x == 0) shared.num_undecided = 0;
  }

  __device__ int num_slots() const { return num_slots_; }

  __device__ int page_of_slot(int slot) const {
    return ((slot / kPageTile << log2_ctas_) + rank_) * kPageTile + slot % kPageTile;
  }

  // Whether scores are kept, and not read again.
  __device__ bool are_kept() const { return are_kept_; }

  // Take note of the score of a slot's page. Every slot once, by any thread; then all_added().
  __device__ void add(int slot, float score) {
    const uint32_t key = key_of(score);
    if (are_kept_) keys_[slot] = key;
    lowest_ = min(lowest_, key);
    highest_ = max(highest_, key);
  }

  // Tell the cluster the range of the keys, and learn that of all.
  __device__ void all_added() {
    const auto range =
        make_uint2(__reduce_min_sync(kAllLanes, lowest_), __reduce_max_sync(kAllLanes, highest_));
    if (lane_ < ctas()) of_cta(&shared_, lane_)->range[warp_of_cluster()] = range;
    sync();
    for (int warp = lane_; warp < ctas() * kWarps; warp += kWarpSize) {
      lowest_ = min(lowest_, shared_.range[warp].x);
      highest_ = max(highest_, shared_.range[warp].y);
    }
    lowest_ = __reduce_min_sync(kAllLanes, lowest_);
    highest_ = __reduce_max_sync(kAllLanes, highest_);
  }

  // Narrow down the lowest of the `count` highest values.
  __device__ Undecided narrow(int count) {
    uint32_t low = lowest_;
    int bits = 32 - __clz(highest_ - lowest_);  // in which what is undecided differs from `low`
    bool by_page = false;                       // of pages with this key
    uint32_t key = 0;
#pragma unroll 1
    for (int step = 0;; ++step) {
      int* const histogram = shared_.histogram[step % 2];
      const int shift = max(0, bits - kDigitBits);
      for_each_block([&](int slot, int page, const uint32_t (&keys)[kNeighbours]) {
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) {
          const uint32_t x = by_page ? num_pages_ - 1 - (page + k) : keys[k];
          const uint32_t bin = (x - low) >> shift;
          const bool is_open = slot + k < num_slots_ && bin < kBins;
          if (is_open && (!by_page || keys[k] == key)) atomicAdd(&histogram[bin], 1);
        }
      });
      sync();
      find_bin(histogram, shared_.histogram[(step + 1) % 2], count);
      const auto found = shared_.found;
      low += static_cast<uint32_t>(found.bin) << shift;
      bits = shift;
      count -= found.above;
      const uint32_t high = low + ((1u << shift) - 1);
      if (found.count <= kMaxUndecided) {
        if (!by_page) return {value(low, ~0u), value(high, 0), count, found.count};
        const uint32_t last = num_pages_ - 1;
        return {value(key, last - low), value(key, last - min(high, last)), count, found.count};
      }
      if (shift == 0) {
        by_page = true;
        key = low;
        low = 0;
        bits = 32 - __clz(num_pages_ - 1);
      }
    }
  }

  // Calls f(i, page) for the chosen pages of this CTA, each by one thread; i numbers those of all
  // CTAs, from 0, in ascending order where there is one CTA.
  template <typename F>
  __device__ void for_each_chosen(const Undecided& range, F f) {
    int before = 0;
    const uint64_t lowest = decide(range, before);
    for_each_block([&](int slot, int page, const uint32_t (&keys)[kNeighbours]) {
      const unsigned chosen = mask(slot, [&](int k) { return value(keys[k], page + k) >= lowest; });
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
  static __device__ uint64_t value(uint32_t key, uint32_t page) {
    return uint64_t{key} << 32 | ~page;
  }
  static __device__ int page_of(uint64_t value) { return ~static_cast<uint32_t>(value); }

  __device__ int ctas() const { return 1 << log2_ctas_; }
  __device__ int warp_of_cluster() const { return rank_ * kWarps + warp_; }

  // Which warp of the cluster has a page.
  __device__ int warp_of(int page) const {
    const int tile = page / kPageTile;
    const int slot = (tile >> log2_ctas_) * kPageTile + page % kPageTile;
    return (tile & (ctas() - 1)) * kWarps + slot / slots_per_warp_;
  }

  __device__ void sync() const {
    if (log2_ctas_ == 0) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  // Calls f(slot, page, keys) for this lane's slots, 4 from `slot` on, and their pages, from `page`
  // on; slots from num_slots_ on do not exist. All lanes of a warp do so together.
  template <typename F>
  __device__ void for_each_block(F f) const {
    const int begin = warp_ * slots_per_warp_, end = min(num_slots_, begin + slots_per_warp_);
#pragma unroll 1
    for (int first = begin; first < end; first += kBlock) {
      const int slot = first + lane_ * kNeighbours, page = page_of_slot(slot);
      uint32_t keys[kNeighbours];
      if (are_kept_) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys_ + slot);
        keys[0] = four.x;
        keys[1] = four.y;
        keys[2] = four.z;
        keys[3] = four.w;
      } else {
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) {
          keys[k] = key_of(load_once(scores_ + min(page + k, num_pages_ - 1)));
        }
      }
      f(slot, page, keys);
    }
  }

  // Those of the 4 slots from `slot` on that exist and for which is_in(k) holds, a bit each.
  template <typename IsIn>
  __device__ unsigned mask(int slot, IsIn is_in) const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kNeighbours; ++k) bits |= static_cast<unsigned>(is_in(k)) << k;
    const int existing = min(max(num_slots_ - slot, 0), kNeighbours);
    return bits & ((1u << existing) - 1);
  }

  __device__ int sum_up_to_lane(int x) const {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, x, step);
      if (lane_ >= step) x += below;
    }
    return x;
  }

  // Find the bin in which the cluster's counts reach `count` from above, and clear the next
  // histogram, which nobody reads any more.
  __device__ void find_bin(const int* histogram, int* next_histogram, int count) {
    constexpr int kPerThread = (kBins + kThreads - 1) / kThreads, kAtOnce = 8;
    const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;  // of its bins
    int counts[kPerThread] = {}, sum = 0;
    if (highest >= 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll 1
        for (int first = 0; first < ctas(); first += kAtOnce) {
          int parts[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            parts[k] = 0;
            if (first + k < ctas()) parts[k] = of_cta(histogram, first + k)[highest - i];
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) counts[i] += parts[k];
        }
        next_histogram[highest - i] = 0;
        sum += counts[i];
      }
    }
    const int up_to_lane = sum_up_to_lane(sum);
    if (lane_ == kWarpSize - 1) shared_.counted[warp_] = up_to_lane;
    __syncthreads();
    int above = __reduce_add_sync(kAllLanes, lane_ < warp_ ? shared_.counted[lane_] : 0);
    above += up_to_lane - sum;
    if (above < count && above + sum >= count) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (above < count && above + counts[i] >= count) {
          shared_.found = {highest - i, above, counts[i]};
        }
        above += counts[i];
      }
    }
    __syncthreads();
  }

  // Decide on the undecided pages. Returns the lowest chosen value, and in `before` how many are
  // chosen in the warps before this one.
  __device__ uint64_t decide(const Undecided& range, int& before) {
    // Tell the cluster how many of this warp's pages are decided, and which are not.
    int decided = 0;
    for_each_block([&](int slot, int page, const uint32_t (&keys)[kNeighbours]) {
      decided += __popc(mask(slot, [&](int k) { return value(keys[k], page + k) > range.high; }));
      const unsigned open = mask(slot, [&](int k) {
        return value(keys[k], page + k) - range.low <= range.high - range.low;
      });
#pragma unroll
      for (int k = 0; k < kNeighbours; ++k) {
        unsigned lanes = __ballot_sync(kAllLanes, open >> k & 1);
        for (; lanes != 0; lanes &= lanes - 1) {
          const int lane = __ffs(lanes) - 1;
          tell(__shfl_sync(kAllLanes, value(keys[k], page + k), lane));
        }
      }
    });
    decided = __reduce_add_sync(kAllLanes, decided);
    if (lane_ < ctas()) of_cta(&shared_, lane_)->decided[warp_of_cluster()] = decided;
    sync();

    // Each warp decides on all of them, a lane on one.
    const uint64_t mine = lane_ < range.num_undecided ? shared_.undecided[lane_] : 0;
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < range.num_undecided; ++i) rank += shared_.undecided[i] > mine;
    const bool is_chosen = lane_ < range.num_undecided && rank < range.count;
    for (int warp = lane_; warp < warp_of_cluster(); warp += kWarpSize) {
      before += shared_.decided[warp];
    }
    before = __reduce_add_sync(kAllLanes, before);
    const bool is_before = is_chosen && warp_of(page_of(mine)) < warp_of_cluster();
    before += __popc(__ballot_sync(kAllLanes, is_before));
    const unsigned last = __ballot_sync(kAllLanes, is_chosen && rank == range.count - 1);
    return __shfl_sync(kAllLanes, mine, __ffs(last) - 1);
  }

  // Have all CTAs know an undecided page: a warp together, a lane one CTA.
  __device__ void tell(uint64_t value) {
    if (lane_ >= ctas()) return;
    auto* const to = of_cta(&shared_, lane_);
    to->undecided[atomicAdd(&to->num_undecided, 1)] = value;
  }

  SelectionMemory<kThreads>& shared_;
  const float* const scores_;
  uint32_t* const keys_;
  const int num_pages_;
  const int log2_ctas_, rank_;  // of the cluster
  const int lane_, warp_;
  bool are_kept_;
  int num_slots_, slots_per_warp_;
  uint32_t lowest_ = ~0u, highest_ = 0;  // keys: that this lane added, then of the cluster
};

}  // namespace quest::cuda
