// Tiles: the keys and values of 16 tokens in shared memory. Each warp copies its own tiles to a
// ring, some ahead of their use.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace quest::cuda {

constexpr int kTileTokens = 16;
constexpr int kHalfTokens = kTileTokens / 2;  // page sizes are multiples of it

// The warps of a CTA, each of which has a ring of tiles. They and the rest of a CTA's memory fit
// 99 KB of shared memory (sm_86, sm_89, sm_120) with one tile in each ring.
template <int kHeadSize>
constexpr int kWarpsFor = kHeadSize <= 128 ? 8 : 4;

// Memory is read in lines of 128 bytes, and tiles begin at lines. A bulk copy moves whole lines
// where source and target have the same offset in their lines. Otherwise it moves each line in two
// parts, which costs up to a quarter of the throughput. See DESIGN.md, "Lines of 128 bytes".
constexpr int kLineBytes = 128;

// The vector of 16 bytes, in a key or in half of a page's bounds, that lane 4 * r + c multiplies
// j-th. Fragments of the matrix product hold permuted columns. The query is loaded with the same
// permutation, so q·k is unchanged.
__device__ constexpr int vec_of(int j, int c) { return j * 4 + c; }

// Load a lane's j-th and next vectors of a row, where both exist. Where rows lie a multiple of
// kLineBytes apart, lanes of odd rows read the next vector first (`is_swapped`): neighbouring lanes
// then read different places of a line.
template <int kVecs>
__device__ __forceinline__ void load_two(const unsigned char* row, int j, int c, bool is_swapped,
                                         Vec (&two)[2]) {
  const auto* vecs = reinterpret_cast<const Vec*>(row);
  if (kVecs % 2 == 0 || j + 1 < kVecs) {
    const Vec first = vecs[vec_of(j + is_swapped, c)], second = vecs[vec_of(j + !is_swapped, c)];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      two[0].word[w] = is_swapped ? second.word[w] : first.word[w];
      two[1].word[w] = is_swapped ? first.word[w] : second.word[w];
    }
  } else {
    two[0] = vecs[vec_of(j, c)];
  }
}

// A tile is four groups of four tokens. The tokens of a group lie one after another in the cache,
// and one copy moves them. A dense group begins at the line after the one before it. A padded group
// begins 32 bytes later, so that lanes with different c read values of four groups at once: warps
// attend to a tile sooner, but copies are slower.
template <int kHeadSize>
struct Tile {
  static constexpr int kVecs = kHeadSize / 32;    // vectors of a key that a lane multiplies
  static constexpr int kRowSize = 2 * kHeadSize;  // elements of a token: key and value
  static constexpr int kRowBytes = 2 * kRowSize;
  static constexpr int kGroupTokens = 4;
  static constexpr int kDensePitch = kGroupTokens * kRowBytes;  // bytes from group to group
  static constexpr int kPaddedPitch = kDensePitch + 32;
  static constexpr int kBytes = kTileTokens / kGroupTokens * kPaddedPitch;
  static_assert(kRowBytes % kLineBytes == 0 && kBytes % kLineBytes == 0);

  // To the matrix unit, the tokens of group g are rows 2g, 2g + 1, 2g + 8 and 2g + 9, which a lane
  // with c = g multiplies with values. Returns the token of row r; row r + 8 holds the second token
  // after it.
  static __device__ constexpr int token_of_row(int r) { return r / 2 * kGroupTokens + r % 2; }

  static __device__ constexpr int offset(int token, int pitch) {
    return token / kGroupTokens * pitch + token % kGroupTokens * kRowBytes;
  }
};

// Issue the copies of a warp's tile, with groups `pitch` bytes apart. `from` is the address of
// token l in lane l < 16. `is_whole`: the tokens of each group lie one after another. The barrier's
// phase ends when the tile has arrived.
template <int kHeadSize>
__device__ __forceinline__ void copy_tile_of(unsigned char* to_shared, int pitch, const void* from,
                                             bool is_whole, Barrier& barrier) {
  using Tile = quest::cuda::Tile<kHeadSize>;
  const int lane = threadIdx.x % kWarpSize;
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
#if __CUDA_ARCH__ >= 900
  if (lane == 0) barrier.expect(kTileTokens * Tile::kRowBytes);
  __syncwarp();
  const int tokens = is_whole ? Tile::kGroupTokens : 1;
  if (lane < kTileTokens && lane % tokens == 0) {
    copy_bulk(to + Tile::offset(lane, pitch), from, tokens * Tile::kRowBytes, barrier);
  }
#else
  constexpr int kVecs = Tile::kRowBytes / sizeof(Vec);
#pragma unroll
  for (int i = 0; i < kTileTokens * kVecs / kWarpSize; ++i) {
    const int token = (i * kWarpSize + lane) / kVecs, vec = (i * kWarpSize + lane) % kVecs;
    const auto token_from = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(from), token);
    copy_vec(to + Tile::offset(token, pitch) + vec * sizeof(Vec), token_from + vec * sizeof(Vec));
  }
  barrier.arrive_when_copied();
#endif
}

// A position in a warp's ring of tiles: the stage, and the parity of its barrier's phase.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace quest::cuda
