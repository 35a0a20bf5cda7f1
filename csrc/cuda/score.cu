// score: an upper bound of q·k for every page of the rows over their budget.
//
// Bytes: 4 * head_size per page and KV head, or 2 * head_size in fp8, each read once. All other
// traffic is small.
#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "score_pages.cuh"
#include "tiles.cuh"

namespace quest::cuda {
namespace {

// 64 rows of 16K tokens on an H200: 75 us with 2 CTAs of 1 stage, 83 us with 1 CTA of 3 stages, 79
// us with 1 CTA of 1 stage, 81 us with 3 CTAs of 1 stage.
constexpr int kMaxCtasPerMultiprocessor = 2;

// Each warp has a ring of tiles in shared memory, the bounds of 16 pages each. While it scores a
// tile, it looks up where its next one lies, and other warps' tiles are being copied.
template <typename T, typename Stored, int kHeadSize, int kGroupTiles>
class Score {
 public:
  using Tile = BoundsTile<Stored, kHeadSize>;
  // Tiles in a warp's ring: as many bytes, whatever an element has.
  static constexpr int kStages = sizeof(__half) / sizeof(Stored);
  static constexpr int kVecs = kHeadSize / 32, kWarps = kWarpsFor<kHeadSize>;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr bool kPadded = false;  // Dense tiles are copied faster, which counts here.
  static constexpr int kChunkPages = kWarps * kTilePages;  // a tile for each warp

  struct alignas(kLineBytes) Memory {
    Barrier arrived[kWarps][kStages];
  };

  // Dynamic shared memory: [Memory, tiles [kStages, kWarps], row_end [num_rows]].
  static constexpr int kTilesBytes = kStages * kWarps * Tile::kDenseBytes;
  static constexpr int shared_bytes(int num_rows) {
    return sizeof(Memory) + kTilesBytes + num_rows * sizeof(int);
  }

  __device__ Score(const ScoreParams& p, Memory& memory, unsigned char* tiles,
                   const Schedule& schedule)
      : p_(p),
        memory_(memory),
        tiles_(tiles),
        schedule_(schedule),
        begin_(schedule.begin(blockIdx.x)),
        end_(schedule.begin(blockIdx.x + 1)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4) {
    look_up(begin_);
  }

  static __device__ int num_pages(const ScoreParams& p, int row) {
    return div_up(p.rows.seq_lens[row], p.cache.page_size);
  }

  // Score this CTA's chunks.
  __device__ void run() {
    for (int number = begin_; number < min(end_, begin_ + kStages); ++number) copy_tile(number);

    Segment segment;
    int pages = 0;
    for (int number = begin_; number < end_; ++number) {
      if (number == begin_ || number == segment.first + segment.count) {
        segment = schedule_.segment(number);
        pages = num_pages(p_, segment.row);
        load_query(segment);
      }
      const int first_page = (number - segment.first) * kChunkPages + warp_ * kTilePages;
      if (first_page < pages) {
        memory_.arrived[warp_][read_end_.stage].wait(read_end_.parity);
        score_tile(tile(read_end_), segment, first_page, pages);
        read_end_.advance(kStages);
        __syncwarp();  // before copies overwrite the tile
      }
      if (number + kStages < end_) copy_tile(number + kStages);
    }
  }

 private:
  __device__ unsigned char* tile(const RingPosition& position) const {
    return tiles_ + (position.stage * kWarps + warp_) * Tile::kDenseBytes;
  }

  // Look up where a chunk's tile lies.
  __device__ void look_up(int number) {
    if (number >= end_) return;
    if (number == begin_ || number == next_.first + next_.count) next_ = schedule_.segment(number);
    const int pages = num_pages(p_, next_.row);
    const int first_page = (number - next_.first) * kChunkPages + warp_ * kTilePages;
    has_next_ = first_page < pages;
    if (!has_next_) return;
    const int page = bounds_page<Stored, kHeadSize>(first_page, pages);
    next_page_ = page % p_.cache.pages_per_block;
    next_block_ = load_once(p_.rows.block_table + next_.row * p_.rows.block_table_stride +
                            page / p_.cache.pages_per_block);
  }

  // Issue the copies of this warp's tile of a chunk.
  __device__ void copy_tile(int number) {
    if (has_next_) {
      copy_bounds<Stored, kHeadSize>(tile(write_end_), kPadded, p_.cache, next_.head, next_block_,
                                     next_page_, memory_.arrived[warp_][write_end_.stage]);
      write_end_.advance(kStages);
    }
    look_up(number + 1);
  }

  // Load the query group. Smaller groups repeat the last head: the maximum stays the same.
  __device__ void load_query(const Segment& segment) {
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      const int head = segment.head * p_.group_size + min(tile * 8 + r_, p_.group_size - 1);
      const T* query = static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                       head * p_.query_head_stride;
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        query_[tile][j] = load_once(query + Vec::kElements * vec_of<Stored, kVecs>(j, c_));
      }
      if constexpr (kIsFp8<Stored>) {
        const float of_head = divide_to_halves<4>(query_[tile]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          divisor_[tile][k] = __shfl_sync(kAllLanes, of_head, 4 * (2 * c_ + k));
        }
      }
    }
  }

  __device__ void score_tile(const unsigned char* tile, const Segment& segment, int first_page,
                             int pages) const {
    const float2 scores = score_pages<Stored, kHeadSize, kGroupTiles, kVecs, kPadded>(
        tile, [&](int group, int j) { return query_[group][j]; },
        [&](int group, int k) { return divisor_[group][k]; });
    // Lanes with c = 0 write the scores of the tile's first 8 pages, with c = 1 the others.
    const int page = first_page + 8 * c_ + Tile::page_of_row(r_);
    if (c_ < 2 && page < pages) {
      p_.scores[segment.row * p_.scores_row_stride + segment.head * p_.scores_head_stride + page] =
          c_ == 0 ? scores.x : scores.y;
    }
  }

  const ScoreParams& p_;
  Memory& memory_;
  unsigned char* const tiles_;
  const Schedule& schedule_;
  const int begin_, end_;
  const int lane_, warp_, r_, c_;

  RingPosition write_end_, read_end_;  // this warp's ring
  Segment next_;                       // the segment of the tile that is copied next
  bool has_next_ = false;
  int next_block_ = 0, next_page_ = 0;  // this lane's page of that tile: block, number in the block

  Vec query_[kGroupTiles][kVecs];  // query head r of each group tile
  float divisor_[kGroupTiles][2];  // of query heads 2c, 2c + 1, for an fp8 cache
};

template <typename T, typename Stored, int kHeadSize, int kGroupTiles>
__global__ void __launch_bounds__(Score<T, Stored, kHeadSize, kGroupTiles>::kThreads,
                                  kMaxCtasPerMultiprocessor)
    score_kernel(const __grid_constant__ ScoreParams p) {
  // grid: [CTAs that the GPU holds]; a CTA scores its part of all chunks, a warp one tile of each.
  using Score = quest::cuda::Score<T, Stored, kHeadSize, kGroupTiles>;
  extern __shared__ __align__(kLineBytes) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<typename Score::Memory*>(shared_memory);
  unsigned char* tiles = shared_memory + sizeof(memory);
  int* row_end = reinterpret_cast<int*>(tiles + Score::kTilesBytes);

  constexpr int kStages = Score::kStages;
  if (threadIdx.x < Score::kWarps * kStages) {
    memory.arrived[threadIdx.x / kStages][threadIdx.x % kStages].init();
  }
  const Schedule schedule = Schedule::build<Score::kThreads>(
      gridDim.x, p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
        const int pages = Score::num_pages(p, row);
        return pages > p.rows.budget_pages[row] ? div_up(pages, Score::kChunkPages) : 0;
      });
  Score score(p, memory, tiles, schedule);
  wait_for_previous_kernel();
  release_next_kernel();
  score.run();
}

// The most CTAs of a kernel that fit a multiprocessor, with the most rows; 0 if none does.
template <typename... Params>
int ctas_per_multiprocessor(void (*kernel)(Params...), int shared_bytes) {
  int ctas = kMaxCtasPerMultiprocessor;
  while (ctas > 0 && shared_memory_for(kernel, ctas) < shared_bytes) --ctas;
  return ctas;
}

template <typename T, typename Stored, int kHeadSize, int kGroupTiles>
cudaError_t launch_score(const ScoreParams& params, cudaStream_t stream) {
  using Score = quest::cuda::Score<T, Stored, kHeadSize, kGroupTiles>;
  const auto kernel = score_kernel<T, Stored, kHeadSize, kGroupTiles>;
  static const int ctas = ctas_per_multiprocessor(kernel, Score::shared_bytes(kMaxRows));
  if (ctas == 0) return cudaErrorInvalidConfiguration;
  return launch(kernel, ctas * num_multiprocessors(), Score::kThreads,
                Score::shared_bytes(params.rows.num_rows), stream, params);
}

}  // namespace

cudaError_t score(const ScoreParams& params, cudaStream_t stream) {
  return for_any_shape(params.cache, params.group_size, [&](auto shape) {
    using S = decltype(shape);
    return launch_score<typename S::Type, typename S::Stored, S::kHeadSize, S::kGroupTiles>(params,
                                                                                            stream);
  });
}

}  // namespace quest::cuda
