// Tiles: 16 tokens' keys and values that a warp has copied to shared memory, some ahead of their
// use.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace quest::cuda {

constexpr int kTileTokens = 16;
constexpr int kHalfTokens = kTileTokens / 2;  // page sizes are multiples of it

// Warps of a CTA, with a ring of tiles each: as many as leave room for a tile each and the rest
// where a CTA has 99 KB of shared memory (sm_86, sm_89, sm_120).
template <int kHeadSize>
constexpr int kRings = kHeadSize <= 128 ? 8 : 4;

// Memory is read by lines of so many bytes. A bulk copy whose two ends lie alike in their lines
// moves whole lines; another moves each in two parts, which costs up to a quarter of the
// throughput. So tiles begin at lines (NOTES.md, version 9).
constexpr int kLineBytes = 128;

// Which 16 bytes of a key, or of a half of a page's bounds, lane 4 * r + c multiplies j-th. Two
// words of them are an operand of a matrix product, which believes them to be other columns; the
// query's are the same.
__device__ constexpr int vec_of(int j, int c) { return j * 4 + c; }

// Of a row, what a lane multiplies j-th and next, where both exist. Where rows lie a multiple of
// kLineBytes apart, those of odd rows read the next one first (`is_swapped`), so that neighbouring
// lanes read different places of a line.
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

// Four tokens, which lie one after another in the cache, are copied at once, then the next four.
// Those lie at the next line; or, padded, 32 bytes further on, so that lanes with different c read
// values of four groups at once. That makes the wait for a tile's end shorter, and copies slower.
template <int kHeadSize>
struct Tile {
  static constexpr int kVecs = kHeadSize / 32;    // of a key that a lane multiplies
  static constexpr int kRowSize = 2 * kHeadSize;  // elements of a token: key and value
  static constexpr int kRowBytes = 2 * kRowSize;
  static constexpr int kGroupTokens = 4;
  static constexpr int kDensePitch = kGroupTokens * kRowBytes;  // from group to group
  static constexpr int kPaddedPitch = kDensePitch + 32;
  static constexpr int kBytes = kTileTokens / kGroupTokens * kPaddedPitch;
  static_assert(kRowBytes % kLineBytes == 0 && kBytes % kLineBytes == 0);

  // To the matrix unit, the tokens of group g are rows 2g, 2g + 1, 2g + 8 and 2g + 9: with them a
  // lane with c = g multiplies values. This is the token of row r, and 2 more that of row r + 8.
  static __device__ constexpr int token_of_row(int r) { return r / 2 * kGroupTokens + r % 2; }

  static __device__ constexpr int offset(int token, int pitch) {
    return token / kGroupTokens * pitch + token % kGroupTokens * kRowBytes;
  }
};

// A warp copies a tile in the background, its groups `pitch` bytes apart; lane l < 16 says where
// token l lies. `is_whole`: each group's tokens lie one after another. A phase of the barrier is
// over when they have arrived.
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

// A place in a warp's ring, and the parity of its barrier's phase.
struct Place {
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
