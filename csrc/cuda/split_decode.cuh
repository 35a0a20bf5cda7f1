// Attention of decode rows, each dealt to as many CTAs as its length needs (split-KV). See
// DESIGN.md, "Split decode".
//
// Positions count the attended tokens of a row, page after page: the tokens of its selected pages,
// or of its whole context. Only the last page can be partly filled. A warp attends to a tile of 16
// positions at a time (attention.cuh).
//
// Each warp has a ring of tiles in shared memory. While it attends to one tile, the next ones are
// being copied.
//
// A chunk is a tile for each warp of a CTA. The chunks of all rows are dealt to the CTAs
// (schedule.cuh). A CTA merges its warps' results for one (row, KV head) in shared memory. Where
// several CTAs have chunks of a (row, KV head), each leaves its result in the workspace, and the
// last CTA to arrive merges them, in the CTAs' order.
#pragma once

#include "attention.cuh"
#include "device.cuh"
#include "rows.cuh"
#include "schedule.cuh"
#include "tiles.cuh"

namespace quest::cuda {

template <typename Stored, int kHead, int kGroupTiles>
struct SplitSizes {
  static constexpr int kHeadSize = kHead;
  static constexpr int kWarps = kWarpsFor<kHeadSize>;
  // Tiles in a warp's ring: as many bytes, whatever an element has.
  static constexpr int kMaxStages = 3 * sizeof(__half) / sizeof(Stored);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunkTokens = kWarps * kTileTokens;
  static constexpr int kHeads = 8 * kGroupTiles;  // query heads of a padded group
  static constexpr int kSlabPitch = kSlab + 4;    // floats; the padding avoids bank conflicts
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  static constexpr int kTileBytes = Tile<Stored, kHeadSize>::kBytes;
};

template <typename S, typename Stored, int kGroupTiles>
struct SplitMemory {
  GroupQuery<Stored, S::kHeadSize, kGroupTiles> query;
  Barrier arrived[S::kWarps][S::kMaxStages];  // a warp's tiles

  // The warps' results for one (row, KV head). The two halves of their softmax states lie apart.
  float warp_max_log2[S::kWarps][S::kHeads], warp_sum[S::kWarps][S::kHeads];
  float sum[S::kHeads];
  alignas(16) float slab[S::kWarps][8][S::kSlabPitch];  // a part of out^T
  bool is_last;
};

// `T`: the type of query and output. `Stored`: that of the cache's elements.
template <typename T, typename Stored, int kHeadSize, int kGroupTiles>
class SplitDecode : CacheScales<Stored> {
 public:
  using S = SplitSizes<Stored, kHeadSize, kGroupTiles>;
  using Memory = SplitMemory<S, Stored, kGroupTiles>;
  static constexpr int kChunkTokens = S::kChunkTokens, kSlabs = S::kSlabs, kThreads = S::kThreads;
  static constexpr int kWarps = S::kWarps;
  using Tile = quest::cuda::Tile<Stored, kHeadSize>;

  // `tiles`: [stages, kWarps] rings in shared memory.
  __device__ SplitDecode(const SparseDecodeParams& p, const KvScales& scales, Memory& memory,
                         unsigned char* tiles, int stages, const Schedule& schedule, int cta)
      : CacheScales<Stored>(scales),
        p_(p),
        memory_(memory),
        tiles_(tiles),
        stages_(stages),
        schedule_(schedule),
        cta_(cta),
        begin_(schedule.begin(cta)),
        end_(schedule.begin(cta + 1)),
        planned_(begin_ - kPlannedTiles),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4),
        warp_attention_(memory.query, Tile::kPaddedPitch, p.scale, p.soft_cap) {}

  // Attend to this CTA's chunks, [begin, end).
  __device__ void run() {
    for (int number = begin_; number < min(end_, begin_ + stages_); ++number) copy_tile(number);

    Segment segment;
    int tokens = 0;
    for (int number = begin_; number < end_; ++number) {
      if (number == begin_ || number == segment.first + segment.count) {
        segment = schedule_.segment(number);
        tokens = num_tokens(p_, segment.row);
        start(segment);
      }
      const int rest = remaining(tokens, number - segment.first);
      if (rest > 0) {
        memory_.arrived[warp_][read_end_.stage].wait(read_end_.parity);
        warp_attention_.attend(tiles_ + (read_end_.stage * kWarps + warp_) * S::kTileBytes, rest);
        read_end_.advance(stages_);
        __syncwarp();  // before copies overwrite the tile
      }
      if (number + stages_ < end_) copy_tile(number + stages_);
      if (number + 1 == end_ || number + 1 == segment.first + segment.count) finish(segment);
    }
  }

  // Tokens that a row attends to.
  static __device__ int num_tokens(const SparseDecodeParams& p, int row) {
    const int seq_len = p.rows.seq_lens[row], budget_pages = p.rows.budget_pages[row];
    const int pages = div_up(seq_len, p.cache.page_size);
    // The newest page, which may be partial, is always selected.
    const int unselected = max(0, pages - budget_pages);
    return seq_len - unselected * p.cache.page_size;
  }

  // CTA `cta` of `num_ctas` attends to its chunks of the rows that `is_ours` accepts. Shared memory
  // holds [Memory, tiles [stages, kWarps], row_end [num_rows]].
  template <typename IsOurs>
  static __device__ void attend(const SparseDecodeParams& p, const KvScales& scales,
                                unsigned char* shared_memory, int stages, int cta, int num_ctas,
                                IsOurs is_ours) {
    auto& memory = *reinterpret_cast<Memory*>(shared_memory);
    unsigned char* tiles = shared_memory + sizeof(memory);
    int* row_end = reinterpret_cast<int*>(tiles + stages * kWarps * S::kTileBytes);
    // A loop, and so a branch: without one, racecheck believes that all threads initialise a
    // barrier.
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll 1
      for (int stage = 0; stage < stages; ++stage) {
        memory.arrived[threadIdx.x / kWarpSize][stage].init();
      }
    }
    const Schedule schedule = Schedule::build<kThreads>(
        num_ctas, p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
          return is_ours(row) ? max(1, div_up(num_tokens(p, row), S::kChunkTokens)) : 0;
        });
    wait_for_previous_kernel();
    release_next_kernel();
    if (p.counters != nullptr && threadIdx.x == 0) {
      for (int row = cta; row < p.rows.num_rows; row += num_ctas) {
        if (is_ours(row)) {
          const int pages = div_up(p.rows.seq_lens[row], p.cache.page_size);
          count_row(p.counters, p.cache.num_kv_heads, pages, p.rows.budget_pages[row]);
        }
      }
    }
    if (schedule.begin(cta) < schedule.begin(cta + 1)) {
      SplitDecode(p, scales, memory, tiles, stages, schedule, cta).run();
    }
  }

  static constexpr int shared_bytes(int stages, int num_rows) {
    return sizeof(Memory) + stages * kWarps * S::kTileBytes + num_rows * sizeof(int);
  }

 private:
  static constexpr int kPlannedTiles = kWarpSize / 2;  // a lane to each half of a tile

  // Positions from the start of this warp's tile in a chunk of a (row, KV head) to the row's end.
  __device__ int remaining(int tokens, int chunk) const {
    return tokens - chunk * kChunkTokens - warp_ * kTileTokens;
  }

  // Look up where this warp's next tiles lie. Lane l looks up half l % 2 of the tile in chunk
  // `first` + l / 2.
  __device__ void plan(int first) {
    planned_ = first;
    planned_rest_ = 0;
    const int number = first + lane_ / 2, half = lane_ % 2;
    if (number >= end_) return;
    const Segment segment = schedule_.segment(number);
    const int row = segment.row, head = segment.head, page_size = p_.cache.page_size;
    const int tokens = num_tokens(p_, row);
    planned_rest_ = remaining(tokens, number - segment.first);
    if (planned_rest_ <= half * kHalfTokens) return;
    const int position = tokens - planned_rest_ + half * kHalfTokens;
    int page = position / page_size;
    if (over_budget(p_.rows.seq_lens[row], p_.rows.budget_pages[row], page_size)) {
      page = load_once(p_.pages + row * p_.pages_row_stride + head * p_.pages_head_stride + page);
    }
    const int token = page * page_size + position % page_size;
    const int block = load_once(p_.rows.block_table + row * p_.rows.block_table_stride +
                                token / p_.cache.block_tokens);
    planned_start_ = block * p_.cache.block_stride + head * p_.cache.head_stride +
                     token % p_.cache.block_tokens * Tile::kRowSize;
  }

  // Issue the copies of this warp's tile of a chunk. Lane 8 * half + token has one position. Past
  // the row's end it copies an earlier position instead, whose logit is masked.
  __device__ void copy_tile(int number) {
    if (number == planned_ + kPlannedTiles) plan(number);
    const int lane = 2 * (number - planned_);
    const int rest = __shfl_sync(kAllLanes, planned_rest_, lane);
    if (rest <= 0) return;
    const int half = lane_ / kHalfTokens % 2, filled = rest - half * kHalfTokens;
    const int64_t start = __shfl_sync(kAllLanes, planned_start_, filled > 0 ? lane + half : lane);
    const int token = filled > 0 ? min(lane_ % kHalfTokens, filled - 1) : 0;
    copy_tile_of<Stored, kHeadSize>(
        tiles_ + (write_end_.stage * kWarps + warp_) * S::kTileBytes, Tile::kPaddedPitch,
        static_cast<const Stored*>(p_.cache.data) + start + token * Tile::kRowSize,
        rest >= kTileTokens, memory_.arrived[warp_][write_end_.stage]);
    write_end_.advance(stages_);
  }

  // Begin with a (row, KV head): load its query and forget all tokens.
  __device__ void start(const Segment& segment) {
    GroupQueryLoad<T, Stored, kHeadSize, kGroupTiles, kThreads> query;
    query.load(static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                   segment.head * p_.group_size * p_.query_head_stride,
               p_.query_head_stride, p_.group_size, this->scales());
    query.store(memory_.query);
    warp_attention_.reset();
    __syncthreads();
  }

  // Merge the warps' results for a (row, KV head). Write the output where this CTA has all its
  // chunks; otherwise leave the result in the workspace.
  __device__ void finish(const Segment& segment) {
    const int cta = cta_;
    const int first_cta = schedule_.owner(segment.first);
    const int last_cta = schedule_.owner(segment.first + segment.count - 1);
    const bool is_whole = first_cta == last_cta;

    // Exchange maxima and sums.
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const SoftmaxState state = warp_attention_.state(tile, k);
        if (r_ == 0) {
          memory_.warp_max_log2[warp_][tile * 8 + 2 * c_ + k] = state.max_log2;
          memory_.warp_sum[warp_][tile * 8 + 2 * c_ + k] = state.sum;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < p_.group_size) {
      const SoftmaxState state = merge_warps(threadIdx.x);
      memory_.sum[threadIdx.x] = sum_of_weights(segment, threadIdx.x, state);
      if (!is_whole) {
        const int64_t row = part(cta, cta == first_cta) * p_.group_size + threadIdx.x;
        p_.workspace.partial_state[row] = state;
      }
    }
    float factor[kGroupTiles][2];
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float max_log2 = max_log2_of_warps(tile * 8 + 2 * c_ + k);
        factor[tile][k] = rescale(warp_attention_.max_log2(tile, k), max_log2);
      }
    }

    // Add up the weighted values, slab by slab.
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      const int num_heads = min(8, p_.group_size - 8 * tile);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (2 * c_ + k >= num_heads) continue;
          warp_attention_.write_values(tile, slab, k, factor[tile][k],
                                       &memory_.slab[warp_][2 * c_ + k][8 * r_]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_heads * kSlab; i += kThreads) {
          const int head = tile * 8 + i / kSlab, dim = slab * kSlab + i % kSlab;
          if (kHeadSize % kSlab != 0 && dim >= kHeadSize) continue;
          float x = 0.0f;
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) x += memory_.slab[warp][i / kSlab][i % kSlab];
          if (is_whole) {
            write_out(segment, head, dim, x, memory_.sum[head]);
          } else {
            const int64_t row = part(cta, cta == first_cta) * p_.group_size + head;
            p_.workspace.partial_out[row * kHeadSize + dim] = x;
          }
        }
        __syncthreads();
      }
    }
    if (!is_whole) arrive(segment, first_cta, last_cta);
  }

  // The place of a CTA's partial result in the workspace. A CTA leaves at most two: its chunks can
  // begin in one (row, KV head) and end in another.
  static __device__ int64_t part(int cta, bool starts_here) { return 2 * cta + starts_here; }

  __device__ float max_log2_of_warps(int head) const {
    float max_log2 = -INFINITY;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      max_log2 = fmaxf(max_log2, memory_.warp_max_log2[warp][head]);
    }
    return max_log2;
  }

  // The softmax state of a query head over all warps.
  __device__ SoftmaxState merge_warps(int head) const {
    const float max_log2 = max_log2_of_warps(head);
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += memory_.warp_sum[warp][head] * rescale(memory_.warp_max_log2[warp][head], max_log2);
    }
    return {max_log2, sum};
  }

  // Count this CTA's arrival. The last CTA to arrive merges all partial results.
  __device__ void arrive(const Segment& segment, int first_cta, int last_cta) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      memory_.is_last = atomicAdd(&p_.workspace.arrivals[first_cta], 1) == last_cta - first_cta;
    }
    __syncthreads();
    if (!memory_.is_last) return;
    __threadfence();

    constexpr int kLoad = 4;
    for (int i = kLoad * threadIdx.x; i < p_.group_size * kHeadSize; i += kLoad * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      SoftmaxState state = no_tokens();
      float out[kLoad] = {};
#pragma unroll 8
      for (int cta = first_cta; cta <= last_cta; ++cta) {
        const int64_t row = part(cta, cta == first_cta) * p_.group_size + head;
        const SoftmaxState other = load_once(p_.workspace.partial_state + row);
        const float4 values = load_once(
            reinterpret_cast<const float4*>(p_.workspace.partial_out + row * kHeadSize + dim));
        const auto [merged, old_factor, factor] = merge(state, other);
        state = merged;
        out[0] = out[0] * old_factor + values.x * factor;
        out[1] = out[1] * old_factor + values.y * factor;
        out[2] = out[2] * old_factor + values.z * factor;
        out[3] = out[3] * old_factor + values.w * factor;
      }
      const float sum = sum_of_weights(segment, head, state);
#pragma unroll
      for (int k = 0; k < kLoad; ++k) write_out(segment, head, dim + k, out[k], sum);
    }
    if (threadIdx.x == 0) p_.workspace.arrivals[first_cta] = 0;
  }

  // The sum of a query head's weights over all tokens, and its sink.
  __device__ float sum_of_weights(const Segment& segment, int head,
                                  const SoftmaxState& state) const {
    return sum_with_sink<T>(state, p_.sinks, segment.head * p_.group_size + head);
  }

  // A row without tokens has no weights: its output is 0.
  __device__ void write_out(const Segment& segment, int head, int dim, float x, float sum) const {
    T* out = static_cast<T*>(p_.out) + segment.row * p_.out_row_stride +
             (segment.head * p_.group_size + head) * p_.out_head_stride + dim;
    *out = Element<T>::from_float(sum == 0.0f ? 0.0f : x / sum * this->of_values());
  }

  const SparseDecodeParams& p_;
  Memory& memory_;
  unsigned char* const tiles_;
  const int stages_;
  const Schedule& schedule_;
  const int cta_;          // this CTA's number in the schedule
  const int begin_, end_;  // this CTA's chunks

  RingPosition write_end_, read_end_;  // this warp's ring
  int planned_;                        // chunk of the first planned tile
  int planned_rest_ = 0;               // positions from the start of this lane's planned tile
  int64_t planned_start_ = 0;          // the offset of this lane's half in the cache, in elements

  const int lane_, warp_, r_, c_;

  WarpAttention<Stored, kHeadSize, kGroupTiles> warp_attention_;
};

}  // namespace quest::cuda
