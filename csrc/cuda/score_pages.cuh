// The product that scores pages: of a tile of their bounds with the query group.
//
// With low = min(q, 0) and high = max(q, 0), a page's bound is low·minimum + high·maximum: a matrix
// product of the pages' rows of bounds with [low | high], for the whole query group at once.
#pragma once

#include "device.cuh"
#include "tiles.cuh"

namespace quest::cuda {

constexpr int kTilePages = 16;

// 16 pages' bounds that a warp has copied to shared memory, a row each. Rows lie apart, so that
// lanes with different r read different places modulo 128 bytes.
template <int kHeadSize>
struct BoundsTile {
  static constexpr int kRowBytes = 4 * kHeadSize;  // minimum and maximum
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kBytes = kTilePages * kPitch;
};

// A warp copies a tile in the background; lane l < 16 says where row l lies. A phase of the barrier
// is over when they have arrived.
template <int kHeadSize>
__device__ __forceinline__ void copy_bounds(unsigned char* to_shared, const void* from,
                                            Barrier& barrier) {
  using Tile = BoundsTile<kHeadSize>;
  const int lane = threadIdx.x % kWarpSize;
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
#if __CUDA_ARCH__ >= 900
  if (lane == 0) barrier.expect(kTilePages * Tile::kRowBytes);
  __syncwarp();
  if (lane < kTilePages) copy_bulk(to + lane * Tile::kPitch, from, Tile::kRowBytes, barrier);
#else
  constexpr int kVecs = Tile::kRowBytes / sizeof(Vec);
#pragma unroll
  for (int i = 0; i < kTilePages * kVecs / kWarpSize; ++i) {
    const int row = (i * kWarpSize + lane) / kVecs, vec = (i * kWarpSize + lane) % kVecs;
    const auto row_from = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(from), row);
    copy_vec(to + row * Tile::kPitch + vec * sizeof(Vec), row_from + vec * sizeof(Vec));
  }
  barrier.arrive_when_copied();
#endif
}

// A warp scores the 16 pages of a tile. `query[g][j]` of lane 4 * r + c: vector vec_of(j, c) of
// query head 8 * g + r; heads are repeated where there are too few, so that the maximum over all
// stays the same. All lanes with the same r get the scores of pages r (x) and r + 8 (y).
template <typename T, int kHeadSize, int kGroupTiles>
__device__ __forceinline__ float2 score_pages(const unsigned char* tile,
                                              const Vec (&query)[kGroupTiles][kHeadSize / 32]) {
  using Tile = BoundsTile<kHeadSize>;
  constexpr int kVecs = kHeadSize / 32;
  // Multiply: minima with low, maxima with high.
  const int lane = threadIdx.x % kWarpSize, c = lane % 4;
  const unsigned char* rows = tile + lane / 4 * Tile::kPitch;
  float sum[kGroupTiles][2][4] = {};  // two sums shorten the chain of products
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    Vec bounds[2][2];  // of rows r and r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* row = reinterpret_cast<const Vec*>(rows + half * 8 * Tile::kPitch);
      bounds[half][0] = row[vec_of<kHeadSize>(j, c)];
      bounds[half][1] = row[kHeadSize / Vec::kElements + vec_of<kHeadSize>(j, c)];
    }
#pragma unroll
    for (int group = 0; group < kGroupTiles; ++group) {
      const Vec& q = query[group][j];
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
#pragma unroll
        for (int bound = 0; bound < 2; ++bound) {
          const MatrixA a = {{{bounds[0][bound].word[w], bounds[0][bound].word[w + 1]},
                              {bounds[1][bound].word[w], bounds[1][bound].word[w + 1]}}};
          const auto part = [&](uint32_t pair) {
            return bound == 0 ? min_pair<T>(pair, 0) : max_pair<T>(pair, 0);
          };
          Element<T>::mma(sum[group][bound], a, part(q.word[w]), part(q.word[w + 1]));
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
        score[half] = fmaxf(score[half], sum[group][0][k] + sum[group][1][k]);
      }
    }
    score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 1));
    score[half] = fmaxf(score[half], __shfl_xor_sync(kAllLanes, score[half], 2));
  }

  return make_float2(score[0], score[1]);
}

}  // namespace quest::cuda
