// cluster_decode: where the pages of a row lie in the cache.
#pragma once

#include "../../params.h"
#include "../device.cuh"
#include "../divisor.cuh"
#include "layout.cuh"

namespace quest::cuda {

// A page of the cache: its block, and its number in the block.
struct CachePage {
  int block, page_in_block;
};

// The block table of a row. Shared memory holds its first kTableEntries entries.
template <int kThreads>
class RowTable {
 public:
  // A thread puts entries threadIdx.x, threadIdx.x + kThreads, ... in shared memory: the first,
  // which the constructor loads, and kMoreEntries more.
  static constexpr int kMoreEntries = kTableEntries / kThreads - 1;
  using MoreEntries = int32_t[kMoreEntries];

  // `entries`: [max_blocks] in device memory. `near_entries`: [kTableEntries] in shared memory.
  // `first_tile_page`: this lane's page in the warp's first tile.
  __device__ RowTable(const KvCache& cache, const Divisor& pages_per_block, const int32_t* entries,
                      int max_blocks, int32_t* near_entries, int first_tile_page)
      : cache_(cache),
        pages_per_block_(pages_per_block),
        entries_(entries),
        near_entries_(near_entries),
        first_entry_(load_once(entries + min(static_cast<int>(threadIdx.x), max_blocks - 1))),
        first_tile_entry_(
            load_once(entries + min(pages_per_block.quotient(first_tile_page), max_blocks - 1))) {}

  // Load a thread's other entries, all at once, for a row of `num_pages` pages.
  __device__ void load(MoreEntries& more, int num_pages) const {
    if (num_blocks(num_pages) <= kThreads) return;
#pragma unroll
    for (int k = 0; k < kMoreEntries; ++k) {
      const int entry = (k + 1) * kThreads + static_cast<int>(threadIdx.x);
      more[k] = load_once(entries_ + min(entry, num_blocks(num_pages) - 1));
    }
  }

  // Store a thread's entries in shared memory. Then all threads pass a barrier.
  __device__ void store(const MoreEntries& more, int num_pages) {
    near_entries_[threadIdx.x] = first_entry_;
    if (num_blocks(num_pages) <= kThreads) return;
#pragma unroll
    for (int k = 0; k < kMoreEntries; ++k) {
      near_entries_[(k + 1) * kThreads + threadIdx.x] = more[k];
    }
  }

  __device__ CachePage look_up(int page) const {
    return place_of(page, [&](int i) {
      return i < kTableEntries ? near_entries_[i] : load_once(entries_ + i);
    });
  }

  // Look up this lane's page of the warp's first tile, before the table is in shared memory. `lane`
  // is the lane whose page it is.
  __device__ CachePage look_up_first(int page, int lane) const {
    return place_of(page, [&](int) { return __shfl_sync(kAllLanes, first_tile_entry_, lane); });
  }

  // Load the entry of this lane's page in the warp's next tile: most of a long row's table is in
  // device memory.
  __device__ void look_ahead(int page) {
    next_tile_entry_ = load_once(entries_ + pages_per_block_.quotient(page));
  }
  __device__ CachePage look_up_next(int page) const {
    return place_of(page, [&](int) { return next_tile_entry_; });
  }

 private:
  __device__ int num_blocks(int num_pages) const {
    return pages_per_block_.quotient(num_pages + cache_.pages_per_block - 1);
  }

  // `entry(i)` is the i-th entry of the block table.
  template <typename Entry>
  __device__ CachePage place_of(int page, Entry entry) const {
    const int i = pages_per_block_.quotient(page);
    return {entry(i), page - i * cache_.pages_per_block};
  }

  const KvCache& cache_;
  const Divisor& pages_per_block_;
  const int32_t* const entries_;
  int32_t* const near_entries_;
  const int32_t first_entry_;       // the first entry that this thread puts in shared memory
  const int32_t first_tile_entry_;  // the entry of this lane's page in the warp's first tile
  int32_t next_tile_entry_ = 0;     // the entry of this lane's page in the warp's next tile
};

}  // namespace quest::cuda
