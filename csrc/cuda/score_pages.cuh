// Scores of 16 pages: the product of a tile of bounds with the query group.
//
// With low = min(q, 0) and high = max(q, 0), a page's bound is low·minimum + high·maximum: a matrix
// product of the pages' rows of bounds with [low | high], for the whole query group at once.
#pragma once

#include "../params.h"
#include "device.cuh"
#include "tiles.cuh"

namespace quest::cuda {

constexpr int kTilePages = 16;

// The bounds of 16 pages in shared memory, a row to a page, in four groups of four pages. Where a
// block holds the bounds of a group one after another, one copy moves them. A dense group begins at
// the line after the one before it. A padded group begins half a line later, so that lanes with
// neighbouring r read different places: scoring is shorter, but copies are slower. See DESIGN.md,
// "Lines of 128 bytes".
template <typename Stored, int kHeadSize>
struct BoundsTile {
  static constexpr int kRowBytes = 2 * kHeadSize * sizeof(Stored);  // minimum and maximum
  static constexpr int kGroupPages = 4;
  static constexpr int kGroups = kTilePages / kGroupPages;
  static constexpr int kDenseBytes = kTilePages * kRowBytes;
  static constexpr int kPadding = kLineBytes / 2;
  static constexpr int kPaddedBytes = kDenseBytes + kGroups * kPadding;
  static_assert(kDenseBytes % kLineBytes == 0 && kPaddedBytes % kLineBytes == 0);

  // The page that the matrix unit takes as row r. Row r + 8 holds the 8th page after it.
  static __device__ constexpr int page_of_row(int r) { return r % 2 * kGroupPages + r / 2; }
  static __device__ constexpr int row_of_page(int page) {
    return page % kGroupPages * 2 + page / kGroupPages;
  }

  static __device__ constexpr int offset(int page, bool padded) {
    return page * kRowBytes + (padded ? page / kGroupPages * kPadding : 0);
  }
};

// The page of a tile that lane l < 16 looks up. Pages from `num_pages` on do not exist; the first
// page of the last group stands in for them.
template <typename Stored, int kHeadSize>
__device__ __forceinline__ int bounds_page(int first_page, int num_pages) {
  constexpr int kGroupPages = BoundsTile<Stored, kHeadSize>::kGroupPages;
  const int page = first_page + static_cast<int>(threadIdx.x) % kTilePages;
  return page < num_pages ? page : (num_pages - 1) / kGroupPages * kGroupPages;
}

// Issue the copies of a warp's tile of bounds. Lane l < 16 gives the l-th page: its block, and its
// number in the block. The barrier's phase ends when the tile has arrived.
template <typename Stored, int kHeadSize>
__device__ __forceinline__ void copy_bounds(unsigned char* to_shared, bool padded,
                                            const KvCache& cache, int kv_head, int block,
                                            int page_in_block, Barrier& barrier) {
  using Tile = BoundsTile<Stored, kHeadSize>;
  const Stored* from = static_cast<const Stored*>(cache.data) + block * cache.block_stride +
                       kv_head * cache.head_stride +
                       (cache.block_tokens + page_in_block) * 2 * kHeadSize;
  const int lane = threadIdx.x % kWarpSize;
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
#if __CUDA_ARCH__ >= 900
  if (lane == 0) barrier.expect(kTilePages * Tile::kRowBytes);
  __syncwarp();
  const bool in_groups = cache.pages_per_block % Tile::kGroupPages == 0;
  const int pages = in_groups ? Tile::kGroupPages : 1;
  if (lane < kTilePages && lane % pages == 0) {
    copy_bulk(to + Tile::offset(lane, padded), from, pages * Tile::kRowBytes, barrier);
  }
#else
  constexpr int kVecs = Tile::kRowBytes / sizeof(Vec);
#pragma unroll
  for (int i = 0; i < kTilePages * kVecs / kWarpSize; ++i) {
    const int row = (i * kWarpSize + lane) / kVecs, vec = (i * kWarpSize + lane) % kVecs;
    const auto row_from = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(from), row);
    copy_vec(to + Tile::offset(row, padded) + vec * sizeof(Vec), row_from + vec * sizeof(Vec));
  }
  barrier.arrive_when_copied();
#endif
}

// Score the 16 pages of a warp's tile. In lane 4 * r + c, `query(g, j)` is vector vec_of(j, c) of
// query head 8 * g + r; smaller groups repeat a head, which leaves the maximum over heads the same.
// All lanes with the same r return the scores of page page_of_row(r) (x) and of the 8th page after
// it (y). For an fp8 cache `divisor(g, k)` is what query head 8 * g + 2 * c + k was divided by
// (divide_to_halves).
template <typename Stored, int kHeadSize, int kGroupTiles, int kUnroll, bool kPadded,
          typename Query, typename Divisor>
__device__ __forceinline__ float2 score_pages(const unsigned char* tile, Query query,
                                              Divisor divisor) {
  using Tile = BoundsTile<Stored, kHeadSize>;
  constexpr int kVecs = kHeadSize / 32;
  using RowVecs = quest::cuda::RowVecs<Stored, kVecs>;
  using Compute = typename CacheElement<Stored>::Compute;
  // Multiply: minima with low, maxima with high.
  const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
  const bool is_swapped = !kPadded && r % 2 != 0;
  // Several sums shorten the chain of products. Tiles of fp8 come twice as fast, so that the chain
  // counts more.
  constexpr int kChains = kIsFp8<Stored> ? 2 : 1;
  float sum[kGroupTiles][2][kChains][4] = {};
#pragma unroll kUnroll
  for (int first_j = 0; first_j < kVecs; first_j += RowVecs::kAtOnce) {
    RowVecs bounds[2][2];  // [row r or r + 8][minima or maxima]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int bound = 0; bound < 2; ++bound) {
        const unsigned char* row = tile + Tile::offset(Tile::page_of_row(r) + 8 * half, kPadded) +
                                   bound * Tile::kRowBytes / 2;
        bounds[half][bound].load(row, first_j, c, is_swapped);
      }
    }
#pragma unroll
    for (int k = 0; k < RowVecs::kAtOnce; ++k) {
      if (kVecs % 2 != 0 && first_j + k == kVecs) break;
#pragma unroll
      for (int group = 0; group < kGroupTiles; ++group) {
        const Vec q = query(group, first_j + k);
#pragma unroll
        for (int bound = 0; bound < 2; ++bound) {
          const auto &x = bounds[0][bound].vec(k), &y = bounds[1][bound].vec(k);
          const auto part = [&](uint32_t pair) {
            return bound == 0 ? min_pair<Compute>(pair, 0) : max_pair<Compute>(pair, 0);
          };
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            const MatrixA a = {{{x.word[w], x.word[w + 1]}, {y.word[w], y.word[w + 1]}}};
            Element<Compute>::mma(sum[group][bound][w / 2 % kChains], a, part(q.word[w]),
                                  part(q.word[w + 1]));
          }
        }
      }
    }
  }

  // Take the maximum over the query group: over a lane's two heads, tiles, then lanes.
  float score[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    score[half] = -INFINITY;
#pragma unroll
    for (int group = 0; group < kGroupTiles; ++group) {
#pragma unroll
      for (int k = 2 * half; k < 2 * half + 2; ++k) {
        const auto of_bound = [&](int bound) {
          const auto& chains = sum[group][bound];
          return kChains == 1 ? chains[0][k] : chains[0][k] + chains[kChains - 1][k];
        };
        float of_head = of_bound(0) + of_bound(1);
        if constexpr (kIsFp8<Stored>) of_head *= divisor(group, k % 2);
        score[half] = fmaxf(score[half], of_head);
      }
    }
    score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 1));
    score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 2));
  }

  return make_float2(score[0], score[1]);
}

}  // namespace quest::cuda
