// The kernel of cluster_decode: score, select and sparse_decode in one launch, with a cluster of
// CTAs for each (row, KV head). See DESIGN.md, "Clusters".
//
// Each CTA scores its pages and sends their keys to all CTAs. Then every CTA selects for itself: a
// common selection would take longer, since its steps wait for the other CTAs. Keys for which
// shared memory has no room lie in device memory, in L2 ("Far keys").
//
// With the score `codes` weigh_pages has weighed the pages, and a CTA scores its part of them by
// their masses ("Codes").
//
// Each CTA attends to an equal part of the chosen pages. The results are merged over the cluster's
// shared memory.
//
// Each warp prefetches its best page as soon as it has scored its last one, so that memory is not
// idle while pages are chosen. That page is nearly always chosen.
//
// A step writes to the newest pages alone. A launch that directly follows write_kv begins while
// write_kv runs, and waits for it only before it reads those pages ("Decode begins beside the
// write").
//
// A long row that fits its budget would keep its cluster busy for long. All CTAs attend to such
// rows together when they are done with their own (split_decode.cuh).
//
// Bytes: those of score and sparse_decode.
#pragma once

#include "../attention.cuh"
#include "../cluster.cuh"
#include "../device.cuh"
#include "../divisor.cuh"
#include "../masses.cuh"
#include "../rows.cuh"
#include "../score_pages.cuh"
#include "../selection.cuh"
#include "../softmax.cuh"
#include "../split_decode.cuh"
#include "../tiles.cuh"
#include "layout.cuh"

namespace quest::cuda {

constexpr int kFewRowsCtas = 4;      // Rows are few where their clusters have so many CTAs or more.
constexpr int kReceiversAtOnce = 8;  // CTAs to which a warp sends keys at once

// The numbers that the kernel divides by.
struct Divisors {
  Divisor page_size, pages_per_block, num_kv_heads;
  Divisor ctas;   // CTAs of a cluster
  Divisor share;  // elements, see ClusterLayout
};

// The work of one CTA in the cluster of a (row, KV head). `T`: the type of query and output.
// `Stored`: that of the cache's elements. `kFarKeys`: block tables can hold more pages than shared
// memory has room for keys.
template <typename T, typename Stored, int kHeadSize, int kGroupTiles, bool kFarKeys>
class ClusterDecode : CacheScales<Stored> {
 public:
  using Layout = ClusterLayout<Stored, kHeadSize, kGroupTiles>;
  using Memory = typename Layout::Memory;
  using Messages = typename Layout::Messages;
  using Tile = quest::cuda::Tile<Stored, kHeadSize>;
  using Bounds = BoundsTile<Stored, kHeadSize>;
  using Attention = WarpAttention<Stored, kHeadSize, kGroupTiles>;
  static constexpr int kWarps = Layout::kWarps, kThreads = Layout::kThreads;
  static constexpr int kTileBytes = Layout::kTileBytes, kResultPitch = Layout::kResultPitch;
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  static constexpr int kKeysPerMessage = 4;
  static constexpr int kFarGroups = 16;  // groups of far keys that a warp loads at once

  // Lay out shared memory, and load the first block-table entries, length and budget of the row: no
  // kernel of this library writes them.
  __device__ ClusterDecode(const ClusterDecodeParams& params, const FarKeys& far_keys,
                           const KvScales& scales, const Divisors& divisors,
                           unsigned char* shared_memory, int ctas, int stages, int room)
      : CacheScales<Stored>(scales),
        p_(params.decode),
        far_keys_(far_keys),
        divisors_(divisors),
        masses_(params.masses),
        kept_(params.kept),
        follows_write_kv_(params.follows_write_kv),
        memory_(*reinterpret_cast<Memory*>(shared_memory)),
        merged_(reinterpret_cast<float*>(shared_memory + Layout::merged())),
        tiles_(shared_memory + Layout::tiles()),
        stages_(stages),
        messages_(reinterpret_cast<Messages*>(shared_memory + Layout::messages(stages))),
        keys_(reinterpret_cast<uint32_t*>(shared_memory + Layout::keys(stages))),
        room_(room),
        bitmap_(reinterpret_cast<uint4*>(keys_ + room)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4),
        cta_{ctas, rank_in_cluster()},
        row_(divisors.num_kv_heads.quotient(cluster_number())),
        head_(cluster_number() - row_ * p_.cache.num_kv_heads),
        table_(p_.rows.block_table + row_ * p_.rows.block_table_stride),
        first_entry_(
            load_once(table_ + min(static_cast<int>(threadIdx.x), p_.rows.max_blocks - 1))),
        first_tile_entry_(load_once(
            table_ + min(divisors.pages_per_block.quotient(first_tile_page() + lane_ % kTilePages),
                         p_.rows.max_blocks - 1))),
        seq_len_(p_.rows.seq_lens[row_]),
        budget_pages_(p_.rows.budget_pages[row_]),
        num_pages_(divisors.page_size.quotient(seq_len_ + p_.cache.page_size - 1)),
        num_newest_(kept_pages(kept_, budget_pages_).newest) {}

  // Wait for the previous kernel, unless it is write_kv or weigh_pages: the query was there before
  // that began. Then load the query group to registers.
  __device__ void load_query() {
    if (!follows_write_kv_ && masses_.data == nullptr) wait_for_previous_kernel();
    query_.load(static_cast<const T*>(p_.query) + row_ * p_.query_row_stride +
                    head_ * p_.group_size * p_.query_head_stride,
                p_.query_head_stride, p_.group_size, this->scales());
  }

  // Whether the cluster attends to its row alone.
  __device__ bool is_ours() const {
    return !is_long_dense(seq_len_, budget_pages_, p_.cache.page_size);
  }

  // After run: release the shared memory behind the barriers for other uses, copies included.
  __device__ static void leave_memory() {
    copies_follow_accesses();
    __syncthreads();
  }

  __device__ void run() {
    // Initialise the barriers.
    if (lane_ < stages_) memory_.arrived.tiles[warp_][lane_].init();
    if (threadIdx.x == 0) expect_messages();
    __syncwarp();
    cluster_arrive();

    // Load the block table, and issue the first bounds before the table arrives.
    int32_t entries[kMoreEntries];
    load_entries(entries);
    if (kFarKeys && scores_bounds()) look_ahead(first_tile_page() + tile_step());
    if (scores_bounds()) fetch_first_bounds();
    keep_entries(entries);
    memory_.selection.clear();
    if (budget_pages_ == kUnsettledPages) wait_for_previous_kernel();
    query_.store(memory_.query);
    __syncthreads();

    // Fill the rings with bounds.
    if (scores_bounds()) {
      for (int i = 1; i < stages_; ++i) fetch_bounds(first_tile_page() + i * tile_step());
    }

    // Wait until all CTAs have begun, so that their shared memory can be written.
    cluster_wait();

    // Score, exchange keys, and select.
    if (is_sparse()) {
      if (scores_bounds()) {
        score();
      } else {
        score_masses();
      }
      cta_.wait_for(memory_.arrived.scores);
      if (has_far_keys()) cluster_sync();
      select();
    }

    // Attend, and merge the results.
    attend();
  }

 private:
  __device__ bool is_sparse() const { return num_pages_ > budget_pages_; }

  // Whether pages have bounds; otherwise weigh_pages has weighed them.
  __device__ bool scores_bounds() const { return is_sparse() && masses_.data == nullptr; }

  // Pages before the newest that are kept. All are scored; the first that are kept do not compete.
  __device__ int num_competing() const { return num_pages_ - num_newest_; }
  __device__ int num_first() const {
    return min(kept_.first_pages, budget_pages_ - num_newest_);  // as kept_pages
  }

  // Pages that are chosen by their scores.
  __device__ int num_chosen() const { return budget_pages_ - num_newest_ - num_first(); }

  // Whether shared memory has no room for the row's keys.
  __device__ bool has_far_keys() const { return kFarKeys && num_competing() > room_; }

  // [num_competing] the keys of all CTAs' pages. After selection, the list of chosen pages.
  __device__ uint32_t* far_keys() const {
    return far_keys_.data + row_ * far_keys_.row_stride + head_ * far_keys_.head_stride;
  }

  // Whether the pages before `page` were written in earlier steps.
  __device__ bool is_settled_before(int page) const { return page + kGrowingPages <= num_pages_; }

  // This CTA's share of the elements [group_size, head_size]. The last CTAs' shares may be smaller.
  __device__ int share() const { return divisors_.share.divisor(); }
  __device__ int first_merged() const { return cta_.rank * share(); }
  __device__ int num_merged() const {
    return max(0, min(share(), p_.group_size * kHeadSize - first_merged()));
  }

  // Announce to the barriers how many bytes all CTAs of the cluster, this one included, will send
  // here.
  __device__ void expect_messages() {
    memory_.arrived.scores.init();
    memory_.arrived.parts.init();
    if (is_sparse()) {
      const int num_messages =
          has_far_keys() ? 0 : (num_competing() + kKeysPerMessage - 1) / kKeysPerMessage;
      memory_.arrived.scores.expect(num_messages * sizeof(uint4) +
                                    cta_.ctas * kWarps * sizeof(WarpPages));
    }
    const int first = first_merged(), end = first + num_merged();
    const int num_heads = (end + kHeadSize - 1) / kHeadSize - first / kHeadSize;
    memory_.arrived.parts.expect(first == end ? 0
                                              : cta_.ctas * (num_merged() * sizeof(float) +
                                                             num_heads * sizeof(SoftmaxState)));
  }

  // With few rows, the time that a warp takes for a tile counts, and tiles are padded. With many,
  // the speed of copies counts, and tiles are dense.
  __device__ bool has_few_rows() const { return cta_.ctas >= kFewRowsCtas; }
  __device__ int pitch() const { return has_few_rows() ? Tile::kPaddedPitch : Tile::kDensePitch; }

  // Whether each warp prefetches its best page before pages are chosen: where a page is a tile.
  __device__ bool prefetches_best() const {
    return p_.cache.page_size == kTileTokens && num_chosen() > 0;
  }

  // Tiles of 16 pages are dealt to the CTAs in turn, then to their warps.
  __device__ int first_tile_page() const { return (warp_ * cta_.ctas + cta_.rank) * kTilePages; }
  __device__ int tile_step() const { return kWarps * cta_.ctas * kTilePages; }

  // A thread puts entries threadIdx.x, threadIdx.x + kThreads, ... of the block table in shared
  // memory: the first, which the constructor loaded, and kMoreEntries more, loaded at once.
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
    memory_.table[threadIdx.x] = first_entry_;
    if (num_blocks() <= kThreads) return;
#pragma unroll
    for (int k = 0; k < kMoreEntries; ++k) {
      memory_.table[(k + 1) * kThreads + threadIdx.x] = entries[k];
    }
  }

  // A page of the cache: its block, and its number in the block.
  struct CachePage {
    int block, page_in_block;
  };

  // Where a page of the row lies. `entry(i)` is the i-th entry of the block table.
  template <typename Entry>
  __device__ CachePage place_of(int page, Entry entry) const {
    const int i = divisors_.pages_per_block.quotient(page);
    return {entry(i), page - i * p_.cache.pages_per_block};
  }
  __device__ CachePage look_up(int page) const {
    return place_of(
        page, [&](int i) { return i < kTableEntries ? memory_.table[i] : load_once(table_ + i); });
  }

  // Issue the copies of a tile of bounds.
  __device__ void fetch_bounds(int first_page) {
    if (first_page >= num_competing()) return;
    const int page = bounds_page<Stored, kHeadSize>(first_page, num_competing());
    if constexpr (kFarKeys) {
      copy_bounds_of(first_page, place_of(page, [&](int) { return next_tile_entry_; }));
      look_ahead(first_page + tile_step());
    } else {
      copy_bounds_of(first_page, look_up(page));
    }
  }

  // Load the block-table entries of the next tile: most of a long row's table is in device memory.
  __device__ void look_ahead(int first_page) {
    if (first_page >= num_competing()) return;
    const int page = bounds_page<Stored, kHeadSize>(first_page, num_competing());
    next_tile_entry_ = load_once(table_ + divisors_.pages_per_block.quotient(page));
  }

  // Issue the copies of this warp's first tile of bounds, before the table is in shared memory.
  __device__ void fetch_first_bounds() {
    const int first_page = first_tile_page();
    if (first_page >= num_competing()) return;
    const int page = bounds_page<Stored, kHeadSize>(first_page, num_competing());
    copy_bounds_of(first_page, place_of(page, [&](int) {
                     return __shfl_sync(kAllLanes, first_tile_entry_, page - first_page);
                   }));
  }

  // Lane l < 16 gives the place of the tile's l-th page.
  __device__ void copy_bounds_of(int first_page, const CachePage& cache_page) {
    if (!is_settled_before(first_page + kTilePages)) wait_for_previous_kernel();
    copy_bounds<Stored, kHeadSize>(tile(write_end_), has_few_rows(), p_.cache, head_,
                                   cache_page.block, cache_page.page_in_block,
                                   memory_.arrived.tiles[warp_][write_end_.stage]);
    write_end_.advance(stages_);
  }

  // Score this CTA's pages, and send their keys and each warp's best page to all CTAs.
  __device__ void score() {
    KeyRange range = KeyRange::of_none();
    int best = -1;  // the first of this lane's pages with the highest key
#pragma unroll 1
    for (int first = first_tile_page(); first < num_competing(); first += tile_step()) {
      wait_for_tile();
      const auto query = [&](int group, int j) {
        const int head = min(group * 8 + r_, p_.group_size - 1);
        return memory_.query[head / 8][j][head % 8 * 4 + c_];
      };
      const auto divisor = [&](int group, int k) {
        return divisor_of(min(group * 8 + 2 * c_ + k, p_.group_size - 1));
      };
      const float2 scores = has_few_rows() ? score_pages<Stored, kHeadSize, kGroupTiles, 1, true>(
                                                 tile(read_end_), query, divisor)
                                           : score_pages<Stored, kHeadSize, kGroupTiles, 1, false>(
                                                 tile(read_end_), query, divisor);
      read_end_.advance(stages_);
      __syncwarp();  // before copies overwrite the tile
      fetch_bounds(first + stages_ * tile_step());

      // Send the keys to all CTAs, 4 to a message: lane 4 * r + c sends those of the c-th 4 pages
      // to CTAs r and r + 8.
      const int page_of_key = first + c_ / 2 * 8 + Bounds::page_of_row(r_);
      uint32_t key = key_of(c_ < 2 ? scores.x : scores.y);
      if (page_of_key < num_first()) {
        key = kNoKey;
      } else if (page_of_key < num_competing()) {
        if (key > range.highest) best = page_of_key;
        range.add(key);
      }
      uint32_t keys[kKeysPerMessage];
#pragma unroll
      for (int k = 0; k < kKeysPerMessage; ++k) {
        keys[k] = __shfl_sync(kAllLanes, key, 4 * Bounds::row_of_page(c_ % 2 * 4 + k) + c_);
      }
      const int page = first + c_ * kKeysPerMessage;
      if (page >= num_competing()) continue;
      if (has_far_keys()) {
        if (r_ == 0) store(far_keys() + page, Vec{{keys[0], keys[1], keys[2], keys[3]}});
        continue;
      }
#pragma unroll 1
      for (int cta = r_; cta < cta_.ctas; cta += kReceiversAtOnce) {
        cta_.tell(cta, keys_ + page, memory_.arrived.scores,
                  make_uint4(keys[0], keys[1], keys[2], keys[3]));
      }
    }

    finish_scores(range, best);
  }

  // What a query head of the group was divided by.
  __device__ float divisor_of(int head) const {
    if constexpr (kIsFp8<Stored>) return memory_.query.divisor[head];
    return 1.0f;
  }

  // Score this CTA's pages by what they weigh, and send their keys and each warp's best page to all
  // CTAs. A lane has four pages, and 128 of a warp are dealt to the CTAs in turn. A lane's next
  // pages are loaded before it scores these.
  __device__ void score_masses() {
    const PairMasses masses(masses_, row_, head_, p_.group_size, seq_len_, p_.cache.page_size);
    const int step = kWarps * cta_.ctas * kWarpSize * kKeysPerMessage;
    int page = ((warp_ * cta_.ctas + cta_.rank) * kWarpSize + lane_) * kKeysPerMessage;
    wait_for_previous_kernel();
    PairMasses::Four next = masses.load(min(page, num_pages_ - 1) & ~(kKeysPerMessage - 1), 0);
#pragma unroll 1
    for (int head = warp_; head < p_.group_size; head += kWarps) {
      const float total = masses.total(head);
      if (lane_ == 0) memory_.totals[head] = total;
    }
    __syncthreads();

    KeyRange range = KeyRange::of_none();
    int best = -1;  // the first of this lane's pages with the highest key
#pragma unroll 1
    for (; page < num_competing(); page += step) {
      const PairMasses::Four four = next;
      if (page + step < num_competing()) next = masses.load(page + step, 0);
      const float4 all = masses.scores(page, memory_.totals, four);
      const float scores[kKeysPerMessage] = {all.x, all.y, all.z, all.w};
      uint32_t keys[kKeysPerMessage];
#pragma unroll
      for (int k = 0; k < kKeysPerMessage; ++k) {
        keys[k] = page + k < num_first() ? kNoKey : key_of(scores[k]);
        if (page + k < num_first() || page + k >= num_competing()) continue;
        if (keys[k] > range.highest) best = page + k;
        range.add(keys[k]);
      }
      if (has_far_keys()) {
        store(far_keys() + page, Vec{{keys[0], keys[1], keys[2], keys[3]}});
        continue;
      }
#pragma unroll 1
      for (int cta = 0; cta < cta_.ctas; ++cta) {
        cta_.tell(cta, keys_ + page, memory_.arrived.scores,
                  make_uint4(keys[0], keys[1], keys[2], keys[3]));
      }
    }
    finish_scores(range, best);
  }

  // Prefetch the warp's best page, and send it and the range of keys to all CTAs.
  __device__ void finish_scores(const KeyRange& range, int best) {
    const KeyRange of_warp = range.of_warp();
    const unsigned has_best =
        __ballot_sync(kAllLanes, best >= 0 && range.highest == of_warp.highest);
    if (prefetches_best() && has_best != 0)
      best_ = __shfl_sync(kAllLanes, best, __ffs(has_best) - 1);
    if (lane_ < cta_.ctas) {
      cta_.tell(lane_, &messages_[cta_.rank].warps[warp_], memory_.arrived.scores,
                make_uint4(of_warp.lowest, of_warp.highest, static_cast<uint32_t>(best_), 0));
    }
    if (best_ >= 0) copy_best(best_);
  }

  // Prefetch a page that will probably be chosen.
  __device__ void copy_best(int page) {
    if (!is_settled_before(page + 1)) wait_for_previous_kernel();
    copy_tokens(start_of(page) + lane_ % kTileTokens * Tile::kRowSize, true);
  }

  // Issue the copies of a tile of keys and values. In lane l < 16, `start` is the offset of token l
  // in the cache, in elements. See copy_tile_of.
  __device__ void copy_tokens(int64_t start, bool is_whole) {
    copy_tile_of<Stored, kHeadSize>(tile(write_end_), pitch(),
                                    static_cast<const Stored*>(p_.cache.data) + start, is_whole,
                                    memory_.arrived.tiles[warp_][write_end_.stage]);
    write_end_.advance(stages_);
  }

  // The offset of a page's keys and values in the cache, in elements.
  __device__ int64_t start_of(int page) const {
    const CachePage cache_page = look_up(page);
    return cache_page.block * p_.cache.block_stride + head_ * p_.cache.head_stride +
           cache_page.page_in_block * p_.cache.page_size * Tile::kRowSize;
  }

  // The range of all CTAs' keys.
  __device__ KeyRange range_of_all() const {
    KeyRange range = KeyRange::of_none();
#pragma unroll 1
    for (int i = lane_; i < kWarps * cta_.ctas; i += kWarpSize) {
      range.add(messages_[i / kWarps].warps[i % kWarps].range);
    }
    return range.of_warp();
  }

  // This warp's tile at a position of its ring.
  __device__ unsigned char* tile(const RingPosition& position) const {
    return tiles_ + Layout::place_of(warp_, position.stage, stages_) * kTileBytes;
  }

  // Wait for the tile at the read end.
  __device__ void wait_for_tile() const {
    memory_.arrived.tiles[warp_][read_end_.stage].wait(read_end_.parity);
  }

  // Choose pages, and list those that this CTA attends to. The list takes the place of the keys,
  // which nothing reads once pages are chosen.
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
        if (i - ours * cta_.ctas == cta_.rank) keys_[ours] = page;
      };
      choose<1>(keys, bitmap_, list, [] {});
    }
  }
  template <int kGroupsAtOnce, typename Keys, typename List, typename LeaveKeys>
  __device__ void choose(Keys keys, uint4* bitmap, List list, LeaveKeys leave_keys) {
    if (num_chosen() > 0) {
      Selection<kThreads, Keys, kGroupsAtOnce> selection(memory_.selection, keys, bitmap,
                                                         num_competing());
      selection.choose(num_chosen(), range_of_all());
      if (num_first() > 0) {
        selection.mark_first(num_first());
        __syncthreads();
      }
      if (prefetches_best()) take_best(selection);
      leave_keys();
      selection.list(list);
    } else {
      for (int i = threadIdx.x; i < num_first(); i += kThreads) list(i, i);
    }
    for (int i = threadIdx.x; i < num_newest_; i += kThreads) {
      list(budget_pages_ - num_newest_ - num_taken_ + i, num_competing() + i);
    }
    __syncthreads();
  }

  // The i-th of the chosen pages that this CTA attends to.
  __device__ int chosen_page(int i) const {
    if (!has_far_keys()) return static_cast<int>(keys_[i]);
    return load_once(reinterpret_cast<int32_t*>(far_keys()) + i * cta_.ctas + cta_.rank);
  }

  // Take the chosen ones of the warps' best pages off the list: they are copied already.
  template <typename Selection>
  __device__ void take_best(Selection& selection) {
    bool is_chosen = false;
    const int i = threadIdx.x;
    if (i < kWarps * cta_.ctas) {
      const int page = messages_[i / kWarps].warps[i % kWarps].best;
      is_chosen = page >= 0 && selection.take(page);
    }
    const unsigned chosen = __ballot_sync(kAllLanes, is_chosen);
    if (lane_ == 0) memory_.best_chosen[warp_] = chosen;
    num_taken_ = __syncthreads_count(is_chosen);
    const int mine = cta_.rank * kWarps + warp_;
    is_best_chosen_ = memory_.best_chosen[mine / kWarpSize] >> mine % kWarpSize & 1;
  }

  // Attend to chosen pages rank, rank + ctas, ..., or to those of all pages in a dense row.
  // Positions count their tokens; only the last page can be partly filled.
  __device__ void attend() {
    Attention attention(memory_.query, pitch(), p_.scale, p_.soft_cap);
    attention.reset();
    const int num_attended = min(num_pages_, budget_pages_) - num_taken_;
    const int num_ours = divisors_.ctas.quotient(num_attended - cta_.rank + cta_.ctas - 1);
    const bool has_newest =
        num_ours > 0 && (num_ours - 1) * cta_.ctas + cta_.rank == num_attended - 1;
    const int unfilled = num_pages_ * p_.cache.page_size - seq_len_;
    tokens_ = num_ours * p_.cache.page_size - (has_newest ? unfilled : 0);

    const int num_tiles = (tokens_ + kTileTokens - 1) / kTileTokens;
    int next = warp_;  // the tile that is copied next

    // Begin with the best page, if it was chosen.
    if (best_ >= 0) {
      for (int i = 1; i < stages_; ++i, next += kWarps) {
        if (next < num_tiles) copy_tile(next);
      }
      wait_for_tile();
      if (is_best_chosen_) attention.attend(tile(read_end_), kTileTokens);
      read_end_.advance(stages_);
      __syncwarp();  // before copies overwrite the tile
    }

    // Attend to the other tiles, and refill the ring.
#pragma unroll 1
    for (; next < num_tiles + stages_ * kWarps; next += kWarps) {
      const int number = next - stages_ * kWarps;
      if (number >= 0) {
        wait_for_tile();
        attention.attend(tile(read_end_), tokens_ - number * kTileTokens);
        read_end_.advance(stages_);
        __syncwarp();  // before copies overwrite the tile
      }
      if (next < num_tiles) copy_tile(next);
    }

    // Merge the results of warps, then of CTAs.
    const float value_scale = this->of_values();  // arrives meanwhile
    wait_for_previous_kernel();
    merge_warps(attention);
    if (p_.counters != nullptr && head_ == 0 && cta_.rank == 0 && threadIdx.x == kThreads - 1) {
      count_row(p_.counters, p_.cache.num_kv_heads, num_pages_, budget_pages_);
    }
    cta_.wait_for(memory_.arrived.parts);
    // Release the next kernel only now: CTAs that start while this kernel's are running crowd on
    // few multiprocessors.
    release_next_kernel();
    merge_ctas(value_scale);
  }

  // Look up where this warp's next tiles lie. Lane l looks up half l % 2 of tile l / 2.
  __device__ void plan(int first_tile) {
    planned_ = first_tile;
    const int position = (first_tile + lane_ / 2 * kWarps) * kTileTokens + lane_ % 2 * kHalfTokens;
    int page = 0;
    if (position < tokens_) {
      const int ours = divisors_.page_size.quotient(position);
      page = is_sparse() ? chosen_page(ours) : ours * cta_.ctas + cta_.rank;
      planned_start_ = start_of(page) + (position - ours * p_.cache.page_size) * Tile::kRowSize;
    }
    if (__any_sync(kAllLanes, !is_settled_before(page + 1))) wait_for_previous_kernel();
  }

  // Issue the copies of this warp's tile. Lane 8 * half + token has one position. Past the end it
  // copies an earlier position instead, whose logit is masked.
  __device__ void copy_tile(int number) {
    constexpr int kPlannedTiles = kWarpSize / 2;
    if (planned_ < 0 || number == planned_ + kPlannedTiles * kWarps) plan(number);
    const int lane = (number - planned_) / kWarps * 2, rest = tokens_ - number * kTileTokens;
    const int half = lane_ / kHalfTokens % 2, filled = rest - half * kHalfTokens;
    const int64_t start = __shfl_sync(kAllLanes, planned_start_, filled > 0 ? lane + half : lane);
    const int token = filled > 0 ? min(lane_ % kHalfTokens, filled - 1) : 0;
    copy_tokens(start + token * Tile::kRowSize, rest >= kTileTokens);
  }

  // Merge the warps' results, and send each CTA its share of the elements [group_size, head_size].
  // All maxima come first, then the sums: merging state by state would wait at each step.
  __device__ void merge_warps(const Attention& attention) {
    float* const values = reinterpret_cast<float*>(tile(RingPosition()));
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int head = tile * 8 + 2 * c_ + k;
        const SoftmaxState state = attention.state(tile, k);
        if (r_ == 0) memory_.warp_state[warp_][head] = state;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const int dim = slab * kSlab + 8 * r_;
          if (head < p_.group_size && dim < kHeadSize) {
            attention.write_values(tile, slab, k, 1.0f, values + head * kResultPitch + dim);
          }
        }
      }
    }
    __syncthreads();

    // Merge two elements in each thread.
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < p_.group_size * kHeadSize; i += 2 * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      SoftmaxState state[kWarps];
      float2 part[kWarps];
      SoftmaxState merged_state = no_tokens();
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        state[warp] = memory_.warp_state[warp][head];
        part[warp] = *reinterpret_cast<const float2*>(
            tiles_ + Layout::place_of(warp, 0, stages_) * kTileBytes +
            (head * kResultPitch + dim) * sizeof(float));
        merged_state.max_log2 = fmaxf(merged_state.max_log2, state[warp].max_log2);
      }
      float2 merged = {};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float factor = rescale(state[warp].max_log2, merged_state.max_log2);
        merged_state.sum += state[warp].sum * factor;
        merged.x += part[warp].x * factor;
        merged.y += part[warp].y * factor;
      }
      const int cta = divisors_.share.quotient(i), element = i - cta * share();
      cta_.tell(cta, merged_ + first_merged() + element, memory_.arrived.parts,
                make_uint2(__float_as_uint(merged.x), __float_as_uint(merged.y)));
      // Send the head's state with its first elements in the share.
      if (dim == 0 || element == 0) {
        cta_.tell(
            cta, &messages_[cta_.rank].state[head], memory_.arrived.parts,
            make_uint2(__float_as_uint(merged_state.max_log2), __float_as_uint(merged_state.sum)));
      }
    }
  }

  // Merge all CTAs' parts of this CTA's share, and write the output. 1, 2 or 4 neighbouring lanes
  // have an element together, with up to 4 CTAs' parts each.
  __device__ void merge_ctas(float value_scale) const {
    constexpr int kParts = 4;
    const int log2_lanes = cta_.ctas <= kParts ? 0 : cta_.ctas <= 2 * kParts ? 1 : 2;
    static_assert(kMaxClusterCtas == 4 * kParts);
    const int lane = lane_ & ((1 << log2_lanes) - 1);
#pragma unroll 1
    for (int first = 0; first < num_merged(); first += kThreads >> log2_lanes) {
      const int i = first + (static_cast<int>(threadIdx.x) >> log2_lanes);
      const int in_share = min(i, num_merged() - 1), element = first_merged() + in_share;
      const int head = element / kHeadSize;
      SoftmaxState state[kParts];
      float part[kParts];
      SoftmaxState merged_state = no_tokens();
      float merged = 0.0f;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const int cta = min(lane + (k << log2_lanes), cta_.ctas - 1);
        state[k] = messages_[cta].state[head];
        part[k] = merged_[cta * share() + in_share];
        if (lane + (k << log2_lanes) >= cta_.ctas) state[k].max_log2 = -INFINITY;
        merged_state.max_log2 = fmaxf(merged_state.max_log2, state[k].max_log2);
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        merged_state.max_log2 =
            fmaxf(merged_state.max_log2, __shfl_xor_sync(kAllLanes, merged_state.max_log2, lanes));
      }
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const float factor = rescale(state[k].max_log2, merged_state.max_log2);
        merged_state.sum += state[k].sum * factor;
        merged += part[k] * factor;
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        merged_state.sum += __shfl_xor_sync(kAllLanes, merged_state.sum, lanes);
        merged += __shfl_xor_sync(kAllLanes, merged, lanes);
      }
      if (lane != 0 || i >= num_merged()) continue;
      const int query_head = head_ * p_.group_size + head;
      T* const out = static_cast<T*>(p_.out) + row_ * p_.out_row_stride +
                     query_head * p_.out_head_stride + element % kHeadSize;
      const float sum = sum_with_sink<T>(merged_state, p_.sinks, query_head);
      // A row without tokens has the output 0.
      *out = Element<T>::from_float(sum == 0.0f ? 0.0f : __fdividef(merged, sum) * value_scale);
    }
  }

  const SparseDecodeParams& p_;
  const FarKeys& far_keys_;
  const Divisors& divisors_;
  const Masses& masses_;
  const Kept& kept_;
  const bool follows_write_kv_;
  Memory& memory_;
  float* const merged_;         // [ctas, share] parts that all CTAs send to this one
  unsigned char* const tiles_;  // [stages, kWarps] tiles
  const int stages_;
  Messages* const messages_;  // [ctas] from each CTA
  // [num_competing] the keys of all CTAs' pages. After selection, the list of pages that this CTA
  // attends to. For a row with far keys, the bitmap.
  uint32_t* const keys_;
  const int room_;  // keys that shared memory has room for
  uint4* const bitmap_;
  const int lane_, warp_, r_, c_;

  const ClusterCta cta_;
  const int row_, head_;
  const int32_t* const table_;
  const int32_t first_entry_;       // the first table entry that this thread puts in shared memory
  const int32_t first_tile_entry_;  // the table entry of this lane's page in the warp's first tile
  const int seq_len_, budget_pages_, num_pages_;
  const int num_newest_;  // pages kept at the row's end
  GroupQueryLoad<T, Stored, kHeadSize, kGroupTiles, kThreads> query_;

  int32_t next_tile_entry_ = 0;        // the entry of this lane's page in the warp's next tile
  RingPosition write_end_, read_end_;  // this warp's ring
  int best_ = -1;                      // the page that this warp prefetches before pages are chosen
  bool is_best_chosen_ = false;
  int num_taken_ = 0;          // chosen pages among all warps' best pages
  int tokens_ = 0;             // tokens that this CTA attends to
  int planned_ = -1;           // the first planned tile
  int64_t planned_start_ = 0;  // the offset in the cache of this lane's half, in elements
};

template <typename T, typename Stored, int kHeadSize, int kGroupTiles, bool kFarKeys>
__global__ void __launch_bounds__(
    ClusterDecode<T, Stored, kHeadSize, kGroupTiles, kFarKeys>::kThreads,
    kFarKeys ? 1 : ClusterLayout<Stored, kHeadSize, kGroupTiles>::kCtasPerMultiprocessor)
    cluster_decode_kernel(const __grid_constant__ ClusterDecodeParams p,
                          const __grid_constant__ Divisors divisors, int ctas, int stages, int room,
                          int num_split_ctas, const __grid_constant__ FarKeys far_keys,
                          const __grid_constant__ KvScales scales) {
  // grid: [rows, KV heads, CTAs of a cluster]; a cluster decodes its (row, KV head), and all CTAs
  // decode long dense rows.
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(kLineBytes) unsigned char shared_memory[];
  using Decode = ClusterDecode<T, Stored, kHeadSize, kGroupTiles, kFarKeys>;
  const Rows& rows = p.decode.rows;
  // Load a row's length and budget in each thread: they tell at the end whether any row is split.
  const int other = min(static_cast<int>(threadIdx.x), rows.num_rows - 1);
  const int other_len = rows.seq_lens[other], other_budget = rows.budget_pages[other];
  Decode decode(p, far_keys, scales, divisors, shared_memory, ctas, stages, room);
  decode.load_query();
  if (decode.is_ours()) {
    decode.run();
  } else {
    wait_for_previous_kernel();
    release_next_kernel();
  }

  // Attend to long dense rows together.
  const auto is_split = [&](int row) {
    return is_long_dense(rows.seq_lens[row], rows.budget_pages[row], p.decode.cache.page_size);
  };
  bool any_split = is_long_dense(other_len, other_budget, p.decode.cache.page_size);
#pragma unroll 1
  for (int row = threadIdx.x + Decode::kThreads; row < rows.num_rows; row += Decode::kThreads) {
    any_split = any_split || is_split(row);
  }
  if (!__syncthreads_or(any_split)) return;
  if (decode.is_ours()) decode.leave_memory();
  SplitDecode<T, Stored, kHeadSize, kGroupTiles>::attend(
      p.decode, scales, shared_memory + sizeof(typename Decode::Layout::Barriers), stages,
      blockIdx.x, num_split_ctas, is_split);
#endif
}

}  // namespace quest::cuda
