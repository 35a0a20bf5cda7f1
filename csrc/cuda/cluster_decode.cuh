// The kernel of cluster_decode: score, select and sparse_decode in one launch, a cluster of CTAs
// for each (row, KV head).
//
// Each CTA scores its share of the pages, and sends the scores to all others. Then every CTA
// selects for itself: that takes less time than to select together, which waits for the others
// again and again. Keys for which shared memory has no room are in device memory, in L2, instead.
// Each CTA attends to its share of the chosen pages, as many as the others, and the results are
// merged over the cluster's shared memory.
//
// So that memory is not idle while pages are being chosen, each warp has its best page copied as
// soon as it has scored the last one. That page is nearly always chosen.
//
// A step writes to the newest pages alone. So a launch that directly follows write_kv begins while
// that still runs, and waits for it only where it comes to those pages.
//
// A long row that fits its budget would keep its cluster busy for long. All CTAs share such rows
// when they are done with their own (split_decode.cuh).
//
// Bytes: those of score and sparse_decode.
#pragma once

#include <algorithm>

#include "attention.cuh"
#include "cluster.cuh"
#include "device.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "rows.cuh"
#include "score_pages.cuh"
#include "selection.cuh"
#include "split_decode.cuh"
#include "tiles.cuh"

namespace quest::cuda {

// CTAs that share a multiprocessor: two, where their registers and tiles have room.
template <int kHeadSize, int kGroupTiles>
constexpr int kResident = kHeadSize <= 128 && kGroupTiles == 1 ? 2 : 1;

constexpr int kRing = 2;             // tiles of a warp, at most
constexpr int kTableEntries = 1024;  // of a row's block table, kept in shared memory
// Pages of a row with far keys for each page of a row without: the bitmap of its pages takes the
// place of the keys, a bit that of a key.
constexpr int kFarFactor = 8 * sizeof(uint32_t);
constexpr int kFewRowsCtas = 4;  // of a cluster, from which on rows are few

// What the kernel divides by.
struct Divisors {
  Divisor page_size, pages_per_block, num_kv_heads;
  Divisor ctas;   // of a cluster
  Divisor share;  // elements [group_size, head_size] that a CTA merges
};

template <int kHeadSize>
struct alignas(16) ClusterBarriers {
  Barrier tiles[kRings<kHeadSize>][kRing];  // of each warp
  Barrier scores;                           // from all CTAs: keys, ranges
  Barrier parts;                            // from all CTAs: merged, weight
};

// What a warp says of the pages that it has scored.
struct alignas(16) WarpPages {
  KeyRange range;  // of their keys
  int32_t best;    // the one that it has copied before pages are chosen; -1: none
};

template <int kHeadSize, int kGroupTiles>
struct alignas(kLineBytes) ClusterMemory {
  static constexpr int kWarps = kRings<kHeadSize>, kHeads = 8 * kGroupTiles;

  ClusterBarriers<kHeadSize> arrived;  // at the start, see kBarrierBytes
  GroupQuery<kHeadSize, kGroupTiles> query;
  uint32_t best_chosen[kWarps];  // of all warps' best pages, a bit each
  SelectionMemory<kWarps * kWarpSize> selection;
  int32_t table[kTableEntries];

  float2 warp_weight[kWarps][kHeads];  // maximum (base 2) and sum of weights
};

// What a CTA says to all of its cluster.
template <int kHeadSize, int kGroupTiles>
struct CtaMessages {
  WarpPages warps[kRings<kHeadSize>];
  float2 weight[8 * kGroupTiles];  // maximum (base 2) and sum of weights, where this CTA merges
};

// One CTA's part in its cluster's work for a (row, KV head). `kWide`: of tables that hold more
// pages than shared memory has room for keys.
template <typename T, int kHeadSize, int kGroupTiles, bool kWide>
class ClusterDecode {
 public:
  using Tile = quest::cuda::Tile<kHeadSize>;
  using Memory = ClusterMemory<kHeadSize, kGroupTiles>;
  using Messages = CtaMessages<kHeadSize, kGroupTiles>;
  static constexpr int kWarps = Memory::kWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  using Attention = WarpAttention<T, kHeadSize, kGroupTiles>;
  using Bounds = BoundsTile<kHeadSize>;
  static constexpr int kKeysOfMessage = 4;
  static constexpr int kToldAtOnce = 8;  // CTAs, by a warp
  static constexpr int kFarGroups = 16;  // of keys in device memory, that a warp asks for at once
  // A warp's tile, or at the end its part of the result: [group_size, head_size], rows lie apart
  // against bank conflicts.
  static constexpr int kPitch = kHeadSize + 4;
  static constexpr int kPartBytes = 8 * kGroupTiles * kPitch * sizeof(float);
  static constexpr int kTileBytes = std::max({Tile::kBytes, Bounds::kPaddedBytes, kPartBytes});
  static_assert(kTileBytes % kLineBytes == 0);

  // Barriers stay what they are: racecheck takes a second barrier in the place of one for a race.
  static constexpr int kBarrierBytes = sizeof(ClusterBarriers<kHeadSize>);

  // Of dynamic shared memory: [Memory, merged [ctas, share], tiles [stages, kWarps],
  // messages [max_ctas], keys [room], bitmap [key_groups(room)]].
  static constexpr int kMergedBytes =
      (8 * kGroupTiles * kHeadSize + 2 * kMaxClusterCtas) * sizeof(float);  // see share_of_cta
  static_assert(kMergedBytes % kLineBytes == 0);
  __host__ __device__ static constexpr int tiles_end(int stages) {
    return sizeof(Memory) + kMergedBytes + stages * kWarps * kTileBytes;
  }
  __host__ __device__ static constexpr int fixed_bytes(int stages) {
    const int max_ctas = stages == 1 ? 1 : kMaxClusterCtas;  // see ClusterLauncher::shared
    return tiles_end(stages) + max_ctas * static_cast<int>(sizeof(Messages));
  }
  static constexpr int room(int shared_bytes, int stages) {
    constexpr int kGroupBytes = kGroupKeys * sizeof(uint32_t) + sizeof(uint4);
    return (shared_bytes - fixed_bytes(stages)) / kGroupBytes * kGroupKeys;
  }

  // Of the elements [group_size, head_size], how many a CTA merges: an even number.
  __host__ __device__ static constexpr int share_of_cta(int group_size, int ctas) {
    return (group_size * kHeadSize + 2 * ctas - 1) / (2 * ctas) * 2;
  }

  __device__ ClusterDecode(const ClusterDecodeParams& params, const FarKeys& far_keys,
                           const Divisors& divisors, unsigned char* shared_memory, int ctas,
                           int stages, int room)
      : p_(params.decode),
        far_keys_(far_keys),
        divisors_(divisors),
        follows_write_kv_(params.follows_write_kv),
        shared_(*reinterpret_cast<Memory*>(shared_memory)),
        merged_(reinterpret_cast<float*>(shared_memory + sizeof(Memory))),
        tiles_(shared_memory + sizeof(Memory) + kMergedBytes),
        stages_(stages),
        messages_(reinterpret_cast<Messages*>(shared_memory + tiles_end(stages))),
        keys_(reinterpret_cast<uint32_t*>(shared_memory + fixed_bytes(stages))),
        room_(room),
        bitmap_(reinterpret_cast<uint4*>(keys_ + room)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4),
        ctas_(ctas),
        rank_(rank_in_cluster()),
        row_(divisors.num_kv_heads.quotient(cluster_number())),
        head_(cluster_number() - row_ * p_.cache.num_kv_heads),
        table_(p_.rows.block_table + row_ * p_.rows.block_table_stride),
        first_entry_(
            load_once(table_ + min(static_cast<int>(threadIdx.x), p_.rows.max_blocks - 1))),
        first_tile_entry_(load_once(
            table_ + min(divisors.pages_per_block.quotient(first_tile_page() + lane_ % kTilePages),
                         p_.rows.max_blocks - 1))),
        seq_len_(p_.rows.seq_lens[row_]),
        budget_(p_.rows.budget_pages[row_]),
        num_pages_(divisors.page_size.quotient(seq_len_ + p_.cache.page_size - 1)) {
    if (!follows_write_kv_) wait_for_previous_kernel();
    query_.load(static_cast<const T*>(p_.query) + row_ * p_.query_row_stride +
                    head_ * p_.group_size * p_.query_head_stride,
                p_.query_head_stride, p_.group_size);
  }

  // Whether this row is not one of those that all CTAs share.
  __device__ bool is_ours() const { return !is_long_dense(seq_len_, budget_, p_.cache.page_size); }

  // After run: the shared memory behind the barriers can be used for something else, by copies as
  // well.
  __device__ static void leave_memory() {
    copies_follow_accesses();
    __syncthreads();
  }

  __device__ void run() {
    // Before other kernels have finished: what depends on none of them. The first bounds are asked
    // for before the table is kept.
    if (lane_ < stages_) shared_.arrived.tiles[warp_][lane_].init();
    if (threadIdx.x == 0) expect_messages();
    __syncwarp();
    cluster_arrive();
    int32_t entries[kMoreEntries];
    load_entries(entries);
    if (kWide && is_sparse()) look_ahead(first_tile_page() + tile_step());
    if (is_sparse()) fetch_first_bounds();
    keep_entries(entries);
    shared_.selection.clear();
    if (budget_ == kUnsettledPages) wait_for_previous_kernel();
    query_.store(shared_.query);
    __syncthreads();
    if (is_sparse()) {
      for (int i = 1; i < stages_; ++i) fetch_bounds(first_tile_page() + i * tile_step());
    }
    cluster_wait();  // until all have begun, so that their shared memory can be written
    if (is_sparse()) {
      score();
      wait_for(shared_.arrived.scores);
      if (has_far_keys()) cluster_sync();
      select();
    }
    attend();
  }

 private:
  __device__ bool is_sparse() const { return num_pages_ > budget_; }

  // The newest page is kept whatever its score; those before it compete.
  __device__ int num_competing() const { return num_pages_ - 1; }

  // Whether shared memory has no room for the row's keys.
  __device__ bool has_far_keys() const { return kWide && num_competing() > room_; }

  // [num_competing], of all CTAs; then the list of chosen pages.
  __device__ uint32_t* far_keys() const {
    return far_keys_.data + row_ * far_keys_.row_stride + head_ * far_keys_.head_stride;
  }

  // Whether the pages before `page` were written in earlier steps.
  __device__ bool is_settled_before(int page) const { return page + kGrowingPages <= num_pages_; }

  // Of the elements [group_size, head_size], those that this CTA merges: all but the last CTAs
  // `share()` of them.
  __device__ int share() const { return divisors_.share.divisor(); }
  __device__ int first_merged() const { return rank_ * share(); }
  __device__ int num_merged() const {
    return max(0, min(share(), p_.group_size * kHeadSize - first_merged()));
  }

  // Say how many bytes the CTAs of the cluster will send this one, itself among them.
  __device__ void expect_messages() {
    shared_.arrived.scores.init();
    shared_.arrived.parts.init();
    if (is_sparse()) {
      const int num_messages =
          has_far_keys() ? 0 : (num_competing() + kKeysOfMessage - 1) / kKeysOfMessage;
      shared_.arrived.scores.expect(num_messages * sizeof(uint4) +
                                    ctas_ * kWarps * sizeof(WarpPages));
    }
    const int first = first_merged(), end = first + num_merged();
    const int num_heads = (end + kHeadSize - 1) / kHeadSize - first / kHeadSize;
    shared_.arrived.parts.expect(
        first == end ? 0 : ctas_ * (num_merged() * sizeof(float) + num_heads * sizeof(float2)));
  }

  // Write what a CTA, this one or another, is to have at `to`. All have it after wait_for(barrier).
  template <typename Message, typename Place>
  __device__ void tell(int cta, Place* to, const Barrier& barrier, const Message& message) const {
    if (ctas_ == 1) {
      *reinterpret_cast<Message*>(to) = message;
    } else {
      send(address_in(to, cta), address_in(&barrier, cta), message);
    }
  }
  __device__ void wait_for(const Barrier& barrier) const {
    if (ctas_ == 1) {
      __syncthreads();
    } else {
      barrier.wait(0);
    }
  }

  // Where rows are few, what counts is how long a warp takes for a tile, elsewhere how fast tiles
  // are copied: they are padded, or not.
  __device__ bool has_few_rows() const { return ctas_ >= kFewRowsCtas; }
  __device__ int pitch() const { return has_few_rows() ? Tile::kPaddedPitch : Tile::kDensePitch; }

  // Whether each warp has its best page copied before pages are chosen: a page as large as a tile.
  __device__ bool takes_best() const { return p_.cache.page_size == kTileTokens && budget_ > 1; }

  // Tiles of 16 pages are dealt to the CTAs in turn.
  __device__ int first_tile_page() const { return (warp_ * ctas_ + rank_) * kTilePages; }
  __device__ int tile_step() const { return kWarps * ctas_ * kTilePages; }

  // A thread keeps entries threadIdx.x, + kThreads, ... of the block table in shared memory: the
  // first, which it has, and so many more, all asked for at once.
  static constexpr int kMoreEntries = kTableEntries / kThreads - 1;
  __device__ int num_blocks() const {
    return divisors_.pages_per_block.quotient(num_pages_ + p_.cache.pages_per_block - 1);
  }
  __device__ void load_entries(int32_t (&entries)[kMoreEntries]) const {
    if (num_blocks() <= kThreads) return;
#pragma unroll
    for (int k = 0; k < kMoreEntries; ++k) {
      const int entry = (k + 1) * kThreads + static_cast<int>(threadIdx.x);
      entries[k] = load_once(table_ + min(entry, num_blocks() - 1));
    }
  }
  __device__ void keep_entries(const int32_t (&entries)[kMoreEntries]) {
    shared_.table[threadIdx.x] = first_entry_;
    if (num_blocks() <= kThreads) return;
#pragma unroll
    for (int k = 0; k < kMoreEntries; ++k) {
      shared_.table[(k + 1) * kThreads + threadIdx.x] = entries[k];
    }
  }

  // Where a page lies: its block, and its number there. `entry(i)` is the i-th of the block table.
  struct PagePlace {
    int block, page;
  };
  template <typename Entry>
  __device__ PagePlace place_of(int page, Entry entry) const {
    const int i = divisors_.pages_per_block.quotient(page);
    return {entry(i), page - i * p_.cache.pages_per_block};
  }
  __device__ PagePlace look_up(int page) const {
    return place_of(
        page, [&](int i) { return i < kTableEntries ? shared_.table[i] : load_once(table_ + i); });
  }

  // Have the bounds of a tile copied.
  __device__ void fetch_bounds(int first_page) {
    if (first_page >= num_competing()) return;
    const int page = bounds_page<kHeadSize>(first_page, num_competing());
    if constexpr (kWide) {
      copy_bounds_of(first_page, place_of(page, [&](int) { return next_tile_entry_; }));
      look_ahead(first_page + tile_step());
    } else {
      copy_bounds_of(first_page, look_up(page));
    }
  }

  // The table of a long row is in device memory for the most part: ask for what the next tile
  // needs.
  __device__ void look_ahead(int first_page) {
    if (first_page >= num_competing()) return;
    const int page = bounds_page<kHeadSize>(first_page, num_competing());
    next_tile_entry_ = load_once(table_ + divisors_.pages_per_block.quotient(page));
  }

  // Those of this warp's first tile, before the table is there.
  __device__ void fetch_first_bounds() {
    const int first_page = first_tile_page();
    if (first_page >= num_competing()) return;
    const int page = bounds_page<kHeadSize>(first_page, num_competing());
    copy_bounds_of(first_page, place_of(page, [&](int) {
                     return __shfl_sync(kAllLanes, first_tile_entry_, page - first_page);
                   }));
  }

  // Lane l < 16 says where the tile's l-th page lies.
  __device__ void copy_bounds_of(int first_page, const PagePlace& place) {
    if (!is_settled_before(first_page + kTilePages)) wait_for_previous_kernel();
    copy_bounds<T, kHeadSize>(tile(copied_), has_few_rows(), p_.cache, head_, place.block,
                              place.page, shared_.arrived.tiles[warp_][copied_.stage]);
    copied_.advance(stages_);
  }

  // Score this CTA's pages.
  __device__ void score() {
    KeyRange range = KeyRange::of_none();
    int best = -1;  // of this lane's pages, the first with the highest key
#pragma unroll 1
    for (int first = first_tile_page(); first < num_competing(); first += tile_step()) {
      wait_for_tile();
      const auto query = [&](int group, int j) {
        const int head = min(group * 8 + r_, p_.group_size - 1);
        return shared_.query[head / 8][j][head % 8 * 4 + c_];
      };
      const float2 scores =
          has_few_rows() ? score_pages<T, kHeadSize, kGroupTiles, 1, true>(tile(used_), query)
                         : score_pages<T, kHeadSize, kGroupTiles, 1, false>(tile(used_), query);
      used_.advance(stages_);
      __syncwarp();  // before copies overwrite the tile
      fetch_bounds(first + stages_ * tile_step());

      // Let all CTAs know the keys, 4 to a message: lane 4 * r + c sends those of the c-th 4 pages
      // to CTAs r, r + 8.
      const uint32_t key = key_of(c_ < 2 ? scores.x : scores.y);
      const int page_of_key = first + c_ / 2 * 8 + Bounds::page_of_row(r_);
      if (page_of_key < num_competing()) {
        if (key > range.highest) best = page_of_key;
        range.add(key);
      }
      uint32_t keys[kKeysOfMessage];
#pragma unroll
      for (int k = 0; k < kKeysOfMessage; ++k) {
        keys[k] = __shfl_sync(kAllLanes, key, 4 * Bounds::row_of_page(c_ % 2 * 4 + k) + c_);
      }
      const int page = first + c_ * kKeysOfMessage;
      if (page >= num_competing()) continue;
      if (has_far_keys()) {
        if (r_ == 0) store(far_keys() + page, Vec{{keys[0], keys[1], keys[2], keys[3]}});
        continue;
      }
#pragma unroll 1
      for (int cta = r_; cta < ctas_; cta += kToldAtOnce) {
        tell(cta, keys_ + page, shared_.arrived.scores,
             make_uint4(keys[0], keys[1], keys[2], keys[3]));
      }
    }
    const KeyRange of_warp = range.of_warp();
    const unsigned has_best =
        __ballot_sync(kAllLanes, best >= 0 && range.highest == of_warp.highest);
    if (takes_best() && has_best != 0) best_ = __shfl_sync(kAllLanes, best, __ffs(has_best) - 1);
    if (lane_ < ctas_) {
      tell(lane_, &messages_[rank_].warps[warp_], shared_.arrived.scores,
           make_uint4(of_warp.lowest, of_warp.highest, static_cast<uint32_t>(best_), 0));
    }
    if (best_ >= 0) copy_best(best_);
  }

  // Have a page copied that will probably be chosen.
  __device__ void copy_best(int page) {
    if (!is_settled_before(page + 1)) wait_for_previous_kernel();
    copy_tokens(start_of(page) + lane_ % kTileTokens * Tile::kRowSize, true);
  }

  // Have a tile's keys and values copied; lane l < 16 says where token l lies in the cache, in
  // elements. See copy_tile_of.
  __device__ void copy_tokens(int64_t start, bool is_whole) {
    copy_tile_of<kHeadSize>(tile(copied_), pitch(), static_cast<const T*>(p_.cache.data) + start,
                            is_whole, shared_.arrived.tiles[warp_][copied_.stage]);
    copied_.advance(stages_);
  }

  // Where a page's keys and values lie in the cache, in elements.
  __device__ int64_t start_of(int page) const {
    const PagePlace place = look_up(page);
    return place.block * p_.cache.block_stride + head_ * p_.cache.head_stride +
           place.page * p_.cache.page_size * Tile::kRowSize;
  }

  // The range of all CTAs' keys.
  __device__ KeyRange range_of_all() const {
    KeyRange range = KeyRange::of_none();
#pragma unroll 1
    for (int i = lane_; i < kWarps * ctas_; i += kWarpSize) {
      range.add(messages_[i / kWarps].warps[i % kWarps].range);
    }
    return range.of_warp();
  }

  // This warp's tile in a place of its ring.
  __device__ unsigned char* tile(const Place& place) const {
    return tiles_ + (place.stage * kWarps + warp_) * kTileBytes;
  }

  // Wait for the tile that is used next.
  __device__ void wait_for_tile() const {
    shared_.arrived.tiles[warp_][used_.stage].wait(used_.parity);
  }

  // Choose pages, and list those that this CTA attends to in the place of the keys, which nobody
  // needs any more once pages are chosen.
  __device__ void select() {
    if (has_far_keys()) {
      const auto keys = [&](int page) {
        const int last_four = (num_competing() - 1) / kLaneKeys * kLaneKeys;
        const Vec four = load_once(static_cast<const void*>(far_keys() + min(page, last_four)));
        return make_uint4(four.word[0], four.word[1], four.word[2], four.word[3]);
      };
      const auto list = [&](int i, int page) { far_keys()[i] = page; };
      choose<kFarGroups>(keys, reinterpret_cast<uint4*>(keys_), list, [] { cluster_sync(); });
    } else {
      const auto keys = [&](int page) {
        return reinterpret_cast<const uint4*>(keys_)[page / kLaneKeys];
      };
      const auto list = [&](int i, int page) {
        const int ours = divisors_.ctas.quotient(i);
        if (i - ours * ctas_ == rank_) keys_[ours] = page;
      };
      choose<1>(keys, bitmap_, list, [] {});
    }
  }
  template <int kGroupsAtOnce, typename Keys, typename List, typename LeaveKeys>
  __device__ void choose(Keys keys, uint4* bitmap, List list, LeaveKeys leave_keys) {
    if (budget_ > 1) {
      Selection<kThreads, Keys, kGroupsAtOnce> selection(shared_.selection, keys, bitmap,
                                                         num_competing());
      selection.choose(budget_ - 1, range_of_all());
      if (takes_best()) take_best(selection);
      leave_keys();
      selection.list(list);
    }
    if (threadIdx.x == 0) list(budget_ - 1 - num_taken_, num_pages_ - 1);
    __syncthreads();
  }

  // The i-th of the chosen pages that this CTA attends to.
  __device__ int chosen_page(int i) const {
    if (!has_far_keys()) return static_cast<int>(keys_[i]);
    return load_once(reinterpret_cast<int32_t*>(far_keys()) + i * ctas_ + rank_);
  }

  // Take the warps' best pages from those that were chosen: they are not listed.
  template <typename Selection>
  __device__ void take_best(Selection& selection) {
    static_assert(kWarps * kMaxClusterCtas <= kThreads);  // a thread each
    bool is_chosen = false;
    const int i = threadIdx.x;
    if (i < kWarps * ctas_) {
      const int page = messages_[i / kWarps].warps[i % kWarps].best;
      is_chosen = page >= 0 && selection.take(page);
    }
    const unsigned chosen = __ballot_sync(kAllLanes, is_chosen);
    if (lane_ == 0) shared_.best_chosen[warp_] = chosen;
    num_taken_ = __syncthreads_count(is_chosen);
    const int mine = rank_ * kWarps + warp_;
    is_best_chosen_ = shared_.best_chosen[mine / kWarpSize] >> mine % kWarpSize & 1;
  }

  // This CTA attends to pages rank, rank + ctas, ... of those chosen, or of all. Positions count
  // their tokens; only the last page can be partly filled.
  __device__ void attend() {
    Attention attention(shared_.query, pitch(), p_.scale, p_.soft_cap);
    attention.reset();
    const int num_attended = min(num_pages_, budget_) - num_taken_;
    const int num_ours = divisors_.ctas.quotient(num_attended - rank_ + ctas_ - 1);
    const bool has_newest = num_ours > 0 && (num_ours - 1) * ctas_ + rank_ == num_attended - 1;
    const int unfilled = num_pages_ * p_.cache.page_size - seq_len_;
    tokens_ = num_ours * p_.cache.page_size - (has_newest ? unfilled : 0);

    const int num_tiles = (tokens_ + kTileTokens - 1) / kTileTokens;
    int next = warp_;  // tile that is copied next
    if (best_ >= 0) {
      for (int i = 1; i < stages_; ++i, next += kWarps) {
        if (next < num_tiles) copy_tile(next);
      }
      wait_for_tile();
      if (is_best_chosen_) attention.attend(tile(used_), kTileTokens);
      used_.advance(stages_);
      __syncwarp();  // before copies overwrite the tile
    }
#pragma unroll 1
    for (; next < num_tiles + stages_ * kWarps; next += kWarps) {
      const int number = next - stages_ * kWarps;
      if (number >= 0) {
        wait_for_tile();
        attention.attend(tile(used_), tokens_ - number * kTileTokens);
        used_.advance(stages_);
        __syncwarp();  // before copies overwrite the tile
      }
      if (next < num_tiles) copy_tile(next);
    }
    wait_for_previous_kernel();
    merge_warps(attention);
    if (p_.counters != nullptr && head_ == 0 && rank_ == 0 && threadIdx.x == kThreads - 1) {
      count_row(p_.counters, p_.cache.num_kv_heads, num_pages_, budget_);
    }
    wait_for(shared_.arrived.parts);
    // Not earlier: CTAs that come while others have not finished are crowded on few
    // multiprocessors.
    release_next_kernel();
    merge_ctas();
  }

  // Look up where this warp's next tiles lie: lane l the half l % 2 of the l / 2-th.
  __device__ void plan(int first_tile) {
    planned_ = first_tile;
    const int position = (first_tile + lane_ / 2 * kWarps) * kTileTokens + lane_ % 2 * kHalfTokens;
    int page = 0;
    if (position < tokens_) {
      const int ours = divisors_.page_size.quotient(position);
      page = is_sparse() ? chosen_page(ours) : ours * ctas_ + rank_;
      planned_start_ = start_of(page) + (position - ours * p_.cache.page_size) * Tile::kRowSize;
    }
    if (__any_sync(kAllLanes, !is_settled_before(page + 1))) wait_for_previous_kernel();
  }

  // Have this warp's tile copied. Lane 8 * half + token has a position; past the end it takes one
  // before it, whose logit is masked.
  __device__ void copy_tile(int number) {
    constexpr int kPlannedTiles = kWarpSize / 2;
    if (planned_ < 0 || number == planned_ + kPlannedTiles * kWarps) plan(number);
    const int lane = (number - planned_) / kWarps * 2, rest = tokens_ - number * kTileTokens;
    const int half = lane_ / kHalfTokens % 2, filled = rest - half * kHalfTokens;
    const int64_t start = __shfl_sync(kAllLanes, planned_start_, filled > 0 ? lane + half : lane);
    const int token = filled > 0 ? min(lane_ % kHalfTokens, filled - 1) : 0;
    copy_tokens(start + token * Tile::kRowSize, rest >= kTileTokens);
  }

  // Merge what the warps found, and send each CTA its share of the elements, [group_size,
  // head_size]. Maximum first, then the sum: rounds that wait for one another take longer.
  __device__ void merge_warps(const Attention& attention) {
    float* const values = reinterpret_cast<float*>(tile(Place()));
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int head = tile * 8 + 2 * c_ + k;
        const float sum = attention.sum_of_weights(tile, k);
        if (r_ == 0) {
          shared_.warp_weight[warp_][head] = make_float2(attention.maximum(tile, k), sum);
        }
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const int dim = slab * kSlab + 8 * r_;
          if (head < p_.group_size && dim < kHeadSize) {
            attention.write_values(tile, slab, k, 1.0f, values + head * kPitch + dim);
          }
        }
      }
    }
    __syncthreads();

    // Two elements a thread.
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < p_.group_size * kHeadSize; i += 2 * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      float2 weight[kWarps], part[kWarps];
      float maximum = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        weight[warp] = shared_.warp_weight[warp][head];
        part[warp] = *reinterpret_cast<const float2*>(tiles_ + warp * kTileBytes +
                                                      (head * kPitch + dim) * sizeof(float));
        maximum = fmaxf(maximum, weight[warp].x);
      }
      float2 merged = {};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float factor = rescale(weight[warp].x, maximum);
        sum += weight[warp].y * factor;
        merged.x += part[warp].x * factor;
        merged.y += part[warp].y * factor;
      }
      const int cta = divisors_.share.quotient(i), element = i - cta * share();
      tell(cta, merged_ + first_merged() + element, shared_.arrived.parts,
           make_uint2(__float_as_uint(merged.x), __float_as_uint(merged.y)));
      // The first of a head's elements in a share bring the head's weight along.
      if (dim == 0 || element == 0) {
        tell(cta, &messages_[rank_].weight[head], shared_.arrived.parts,
             make_uint2(__float_as_uint(maximum), __float_as_uint(sum)));
      }
    }
  }

  // Merge what the CTAs found, this one's share. Neighbouring lanes have an element together, with
  // up to 4 CTAs' parts each.
  __device__ void merge_ctas() const {
    constexpr int kParts = 4;
    const int log2_lanes = ctas_ <= kParts ? 0 : ctas_ <= 2 * kParts ? 1 : 2;
    static_assert(kMaxClusterCtas == 4 * kParts);
    const int lane = lane_ & ((1 << log2_lanes) - 1);
#pragma unroll 1
    for (int first = 0; first < num_merged(); first += kThreads >> log2_lanes) {
      const int i = first + (static_cast<int>(threadIdx.x) >> log2_lanes);
      const int in_share = min(i, num_merged() - 1), element = first_merged() + in_share;
      const int head = element / kHeadSize;
      float2 weight[kParts];
      float part[kParts];
      float maximum = -INFINITY, sum = 0.0f, merged = 0.0f;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const int cta = min(lane + (k << log2_lanes), ctas_ - 1);
        weight[k] = messages_[cta].weight[head];
        part[k] = merged_[cta * share() + in_share];
        if (lane + (k << log2_lanes) >= ctas_) weight[k].x = -INFINITY;
        maximum = fmaxf(maximum, weight[k].x);
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, lanes));
      }
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const float factor = rescale(weight[k].x, maximum);
        sum += weight[k].y * factor;
        merged += part[k] * factor;
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        merged += __shfl_xor_sync(kAllLanes, merged, lanes);
      }
      if (lane != 0 || i >= num_merged()) continue;
      T* const out = static_cast<T*>(p_.out) + row_ * p_.out_row_stride +
                     (head_ * p_.group_size + head) * p_.out_head_stride + element % kHeadSize;
      *out = Element<T>::from_float(sum == 0.0f ? 0.0f : __fdividef(merged, sum));  // 0: no tokens
    }
  }

  const SparseDecodeParams& p_;
  const FarKeys& far_keys_;
  const Divisors& divisors_;
  const bool follows_write_kv_;
  Memory& shared_;
  float* const merged_;  // [CTAs, a share of the elements]
  unsigned char* const tiles_;
  const int stages_;
  Messages* const messages_;  // of each CTA
  // [num_competing], of all CTAs; then the list of pages that this one attends to. For a row with
  // far keys, the bitmap.
  uint32_t* const keys_;
  const int room_;  // for keys
  uint4* const bitmap_;
  const int lane_, warp_, r_, c_;

  const int ctas_, rank_;  // of the cluster
  const int row_, head_;
  const int32_t* const table_;
  const int32_t first_entry_;  // of the table, of those that this thread keeps in shared memory
  const int32_t first_tile_entry_;  // and of this lane's page in the warp's first tile
  const int seq_len_, budget_, num_pages_;
  GroupQueryLoad<T, kHeadSize, kGroupTiles, kThreads> query_;

  int32_t next_tile_entry_ = 0;  // as first_tile_entry_
  Place copied_, used_;          // the next tiles of this warp
  int best_ = -1;                // page that this warp has copied before any was chosen
  bool is_best_chosen_ = false;
  int num_taken_ = 0;          // chosen pages that warps have copied so
  int tokens_ = 0;             // that this CTA attends to
  int planned_ = -1;           // the first planned tile
  int64_t planned_start_ = 0;  // of this lane's planned half in the cache, in elements
};

template <typename T, int kHeadSize, int kGroupTiles, bool kWide>
__global__ void __launch_bounds__(ClusterDecode<T, kHeadSize, kGroupTiles, kWide>::kThreads,
                                  kWide ? 1 : kResident<kHeadSize, kGroupTiles>)
    cluster_decode_kernel(const __grid_constant__ ClusterDecodeParams p,
                          const __grid_constant__ Divisors divisors, int ctas, int stages, int room,
                          int sharing, const __grid_constant__ FarKeys far_keys) {
  // grid: [rows, KV heads, CTAs of a cluster]
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(kLineBytes) unsigned char shared_memory[];
  using Decode = ClusterDecode<T, kHeadSize, kGroupTiles, kWide>;
  const Rows& rows = p.decode.rows;
  // Of another row, a thread each: asked for now, needed at the end.
  const int other = min(static_cast<int>(threadIdx.x), rows.num_rows - 1);
  const int other_len = rows.seq_lens[other], other_budget = rows.budget_pages[other];
  Decode decode(p, far_keys, divisors, shared_memory, ctas, stages, room);
  if (decode.is_ours()) {
    decode.run();
  } else {
    wait_for_previous_kernel();
    release_next_kernel();
  }
  const auto is_shared = [&](int row) {
    return is_long_dense(rows.seq_lens[row], rows.budget_pages[row], p.decode.cache.page_size);
  };
  bool any_shared = is_long_dense(other_len, other_budget, p.decode.cache.page_size);
#pragma unroll 1
  for (int row = threadIdx.x + Decode::kThreads; row < rows.num_rows; row += Decode::kThreads) {
    any_shared = any_shared || is_shared(row);
  }
  if (!__syncthreads_or(any_shared)) return;
  if (decode.is_ours()) decode.leave_memory();
  SplitDecode<T, kHeadSize, kGroupTiles>::attend(p.decode, shared_memory + Decode::kBarrierBytes,
                                                 stages, blockIdx.x, sharing, is_shared);
#endif
}

template <typename M, bool kWide>
struct ClusterLauncher {
  using Decode = ClusterDecode<typename M::Type, M::kHeadSize, M::kGroupTiles, kWide>;
  using Split = SplitDecode<typename M::Type, M::kHeadSize, M::kGroupTiles>;
  static constexpr auto kernel =
      cluster_decode_kernel<typename M::Type, M::kHeadSize, M::kGroupTiles, kWide>;

  // What the current device has room for, where `stages` tiles a warp and as many CTAs as that
  // leaves room for share a multiprocessor.
  struct Limits {
    int stages;
    int shared_bytes;                   // of a CTA
    int clusters[kMaxClusterCtas + 1];  // at a time, by their CTAs
  };

  static cudaLaunchConfig_t config(int clusters, int ctas, int shared_bytes, cudaStream_t stream,
                                   cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters * ctas);
    config.blockDim = dim3(Decode::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
  }

  // One tile a warp, so that two CTAs share a multiprocessor. No clusters of several.
  static const Limits& shared() {
    static const Limits found = find_limits(1, kResident<M::kHeadSize, M::kGroupTiles>, 1);
    return found;
  }

  // Two tiles a warp.
  static const Limits& alone() {
    static const Limits found = find_limits(kRing, 1, kMaxClusterCtas);
    return found;
  }

  // The sizes of clusters that are used: 16 CTAs, then 8 and fewer. A ninth takes another round of
  // messages.
  static int next_smaller(int ctas) { return std::min(ctas - 1, Decode::kToldAtOnce); }

  static Limits find_limits(int stages, int resident, int max_ctas) {
    Limits limits = {.stages = stages};
    const int bytes = shared_memory_for(kernel, resident);
    shared_memory_for(kernel, 1);  // allow it the most, whichever limits are found last
    if (bytes < Decode::fixed_bytes(stages) ||
        bytes < Decode::kBarrierBytes + Split::shared_bytes(stages, kMaxRows)) {
      return limits;
    }
    limits.shared_bytes = bytes;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (int ctas = max_ctas; ctas > 0; ctas = next_smaller(ctas)) {
      cudaLaunchAttribute attributes[2];
      const auto one = config(1, ctas, bytes, nullptr, attributes);
      if (cudaOccupancyMaxActiveClusters(&limits.clusters[ctas], kernel, &one) != cudaSuccess) {
        limits.clusters[ctas] = 0;
        cudaGetLastError();  // clusters of this size do not exist here
      }
    }
    return limits;
  }

  static int room(const Limits& limits) {
    return limits.clusters[1] == 0 ? 0 : Decode::room(limits.shared_bytes, limits.stages);
  }

  // Where rows are few, in the largest clusters that all run at once with a multiprocessor to each
  // CTA. Larger ones, two CTAs to a multiprocessor, are slower. Where rows are many, their tables
  // may still need a multiprocessor's whole memory.
  static cudaError_t launch(const ClusterDecodeParams& params, const FarKeys& far_keys,
                            cudaStream_t stream) {
    const KvCache& cache = params.decode.cache;
    const Rows& rows = params.decode.rows;
    const int pairs = rows.num_rows * cache.num_kv_heads;
    int ctas = kMaxClusterCtas;
    while (ctas > 1 && alone().clusters[ctas] < pairs) ctas = next_smaller(ctas);
    const bool all_at_once = alone().clusters[ctas] >= pairs;
    const bool need_whole_memory = rows.max_blocks * cache.pages_per_block > room(shared());
    const Limits& limits = all_at_once || need_whole_memory ? alone() : shared();
    if (limits.clusters[1] == 0) return cudaErrorInvalidConfiguration;
    const int sharing = std::min(pairs * ctas, max_decode_ctas());  // CTAs: long dense rows
    const Divisors divisors = {Divisor(cache.page_size), Divisor(cache.pages_per_block),
                               Divisor(cache.num_kv_heads), Divisor(ctas),
                               Divisor(Decode::share_of_cta(params.decode.group_size, ctas))};
    cudaLaunchAttribute attributes[2];
    const auto all = config(pairs, ctas, limits.shared_bytes, stream, attributes);
    return cudaLaunchKernelEx(&all, kernel, params, divisors, ctas, limits.stages, room(limits),
                              sharing, far_keys);
  }
};

}  // namespace quest::cuda
