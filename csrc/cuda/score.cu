// score: an upper bound of q·k for every page of the rows over their budget.
//
// With low = min(q, 0) and high = max(q, 0), a page's bound is low·minimum + high·maximum: a matrix
// product of the pages' rows of bounds with [low | high], for the whole query group at once.
//
// Bytes: 4 * head_size per page and KV head, each read once. Nothing else counts.
#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTilePages = 16;                    // that a warp scores at a time
constexpr int kChunkPages = kWarps * kTilePages;  // of one (row, KV head)
constexpr int kPlannedChunks = 16;                // whose pages are looked up at a time

struct Chunk {
  int row, head;
  int first_page, num_pages;  // of the chunk; of the row
};

struct Plan {
  Chunk chunks[kPlannedChunks];
  int64_t bounds[kPlannedChunks][kChunkPages];  // where each page's bounds begin, in elements
};

// Lanes load 16 bytes of a row of bounds: lane 4 * r + c has columns 32 * j + 8 * c onwards of rows
// r and r + 8. Two of its words, four columns, are one operand of a matrix product; that these are
// not the columns the product thinks they are does not matter, as long as the query's are the same.
template <typename T, int kHeadSize, int kGroupTiles>
__global__ void __launch_bounds__(kThreads, kHeadSize <= 128 && kGroupTiles == 1 ? 2 : 1)
    score_kernel(const __grid_constant__ ScoreParams p) {
  // grid: [CTAs that the GPU holds]; a CTA scores its share of all chunks, a warp tiles of them.
  constexpr int kVecs = kHeadSize / 32;  // that a lane loads of a minimum or a maximum
  static_assert(kHeadSize % 32 == 0);
  extern __shared__ int row_end[];
  __shared__ Plan plan;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int r = lane / 4, c = lane % 4;
  const T* cache = static_cast<const T*>(p.cache.data);
  const int pages_per_block = p.cache.block_tokens / p.cache.page_size;
  const int row_size = 2 * kHeadSize;

  // Take a share of the work.
  const auto pages_of_row = [&](int row) {
    return div_up(p.rows.seq_lens[row], p.cache.page_size);
  };
  const Schedule schedule =
      Schedule::build<kThreads>(p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
        const int pages = pages_of_row(row);
        return pages > p.rows.budgets[row] ? div_up(pages, kChunkPages) : 0;
      });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);

  Vec low[2][kVecs], high[2][kVecs];  // bounds of the tile's rows r and r + 8
  Vec query[kGroupTiles][kVecs];      // of query head r of each group tile

  if (begin == end) wait_for_previous_kernel();
  bool is_first_plan = true;
  for (int planned = begin; planned < end; planned += kPlannedChunks) {
    const int num_chunks = min(kPlannedChunks, end - planned);

    // Look up where the bounds lie. Beyond the last page, look at it again.
    if (threadIdx.x < num_chunks) {
      const int chunk = planned + threadIdx.x;
      const Segment segment = schedule.segment(chunk);
      plan.chunks[threadIdx.x] = {segment.row, segment.head, (chunk - segment.first) * kChunkPages,
                                  pages_of_row(segment.row)};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_chunks * kChunkPages; i += kThreads) {
      const Chunk chunk = plan.chunks[i / kChunkPages];
      const int page = min(chunk.first_page + i % kChunkPages, chunk.num_pages - 1);
      const int block = load_once(p.rows.block_table + chunk.row * p.rows.block_table_stride +
                                  page / pages_per_block);
      const int row_in_block = p.cache.block_tokens + page % pages_per_block;
      plan.bounds[i / kChunkPages][i % kChunkPages] =
          block * p.cache.block_stride + chunk.head * p.cache.head_stride + row_in_block * row_size;
    }
    __syncthreads();
    if (is_first_plan) {
      wait_for_previous_kernel();
      release_next_kernel();
      is_first_plan = false;
    }

    const auto has_tile = [&](int i) {
      const Chunk& chunk = plan.chunks[i];
      return i < num_chunks && chunk.first_page + warp * kTilePages < chunk.num_pages;
    };
    const auto load_bounds = [&](int i, int column, Vec(&bounds)[2][kVecs]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* row = cache + plan.bounds[i][warp * kTilePages + half * 8 + r] + column + 8 * c;
#pragma unroll
        for (int j = 0; j < kVecs; ++j) bounds[half][j] = load_once(row + 32 * j);
      }
    };
    const auto load_query = [&](const Chunk& chunk) {
#pragma unroll
      for (int tile = 0; tile < kGroupTiles; ++tile) {
        // Repeat heads where there are too few: the maximum stays the same.
        const int head = chunk.head * p.group_size + (tile * 8 + r) % p.group_size;
        const T* q = static_cast<const T*>(p.query) + chunk.row * p.query_row_stride +
                     head * p.query_head_stride + 8 * c;
#pragma unroll
        for (int j = 0; j < kVecs; ++j) query[tile][j] = load_once(q + 32 * j);
      }
    };

    // Stream the tiles: the next one's bounds are on their way while one is scored.
    if (has_tile(0)) {
      load_bounds(0, 0, low);
      load_bounds(0, kHeadSize, high);
    }
    for (int i = 0; i < num_chunks; ++i) {
      const Chunk chunk = plan.chunks[i];
      if (i == 0 || chunk.first_page == 0) load_query(chunk);
      const bool scores_tile = has_tile(i), loads_tile = i + 1 < num_chunks && has_tile(i + 1);

      float sum[kGroupTiles][2][4] = {};  // the two sums of a tile shorten the chain of products
      const auto add_products = [&](const Vec(&bounds)[2][kVecs], bool are_low) {
        const auto part = [&](uint32_t q) {
          return are_low ? min_pair<T>(q, 0) : max_pair<T>(q, 0);
        };
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
          for (int j = 0; j < kVecs; ++j) {
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
              const MatrixA rows = {{{bounds[0][j].word[w], bounds[0][j].word[w + 1]},
                                     {bounds[1][j].word[w], bounds[1][j].word[w + 1]}}};
              Element<T>::mma(sum[tile][w / 2], rows, part(query[tile][j].word[w]),
                              part(query[tile][j].word[w + 1]));
            }
          }
        }
      };
      if (scores_tile) add_products(low, true);
      if (loads_tile) load_bounds(i + 1, 0, low);
      if (scores_tile) add_products(high, false);
      if (loads_tile) load_bounds(i + 1, kHeadSize, high);
      if (!scores_tile) continue;

      // Take the maximum over the query group: over a lane's two heads, tiles, then lanes.
      float score[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        score[half] = -INFINITY;
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
          for (int k = 2 * half; k < 2 * half + 2; ++k) {
            score[half] = fmaxf(score[half], sum[tile][0][k] + sum[tile][1][k]);
          }
        }
        score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 1));
        score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 2));
      }

      // Write: lanes with c = 0 the tile's first 8 pages, with c = 1 the others.
      const int page = chunk.first_page + warp * kTilePages + 8 * c + r;
      if (c < 2 && page < chunk.num_pages) {
        p.scores[chunk.row * p.scores_row_stride + chunk.head * p.scores_head_stride + page] =
            c == 0 ? score[0] : score[1];
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t score(const ScoreParams& params, cudaStream_t stream) {
  return for_shape(params.cache, params.group_size, [&](auto shape) {
    using S = decltype(shape);
    const auto kernel = score_kernel<typename S::Type, S::kHeadSize, S::kGroupTiles>;
    static const int ctas = ctas_per_multiprocessor(kernel, kThreads, 0);
    return launch(kernel, ctas * num_multiprocessors(), kThreads,
                  params.rows.num_rows * sizeof(int), stream, params);
  });
}

}  // namespace quest::cuda
