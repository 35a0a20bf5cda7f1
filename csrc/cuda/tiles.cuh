// Tiles: the keys and values of 16 tokens in shared memory. Each warp copies its own tiles to a
// ring, some ahead of their use.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "fp8.cuh"

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

// The 16 bytes of a row that lane 4 * r + c loads j-th. As an expression of its callers, ptxas 13.0
// assigns other registers.
__device__ constexpr int line_vec(int j, int c) { return j * 4 + c; }

// The vector of 8 elements, in a key or in half of a page's bounds, that lane 4 * r + c multiplies
// j-th, of kVecs. Fragments of the matrix product hold permuted columns. The query is loaded with
// the same permutation, so q·k is unchanged. A lane loads 16 bytes at once, which are two vectors
// of fp8; where their number is odd, the last is alone.
template <typename Stored, int kVecs>
__device__ constexpr int vec_of(int j, int c) {
  if (!kIsFp8<Stored> || (kVecs % 2 != 0 && j == kVecs - 1)) return line_vec(j, c);
  return j / 2 * 8 + 2 * c + j % 2;
}

// Load a lane's j-th and next 16 bytes of a row, where both exist. Where rows lie a multiple of
// kLineBytes apart, lanes of odd rows read the next vector first (`is_swapped`): neighbouring lanes
// then read different places of a line.
template <int kVecs>
__device__ __forceinline__ void load_two(const unsigned char* row, int j, int c, bool is_swapped,
                                         Vec (&two)[2]) {
  const auto* vecs = reinterpret_cast<const Vec*>(row);
  if (kVecs % 2 == 0 || j + 1 < kVecs) {
    const Vec first = vecs[line_vec(j + is_swapped, c)],
              second = vecs[line_vec(j + !is_swapped, c)];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      two[0].word[w] = is_swapped ? second.word[w] : first.word[w];
      two[1].word[w] = is_swapped ? first.word[w] : second.word[w];
    }
  } else {
    two[0] = vecs[line_vec(j, c)];
  }
}

// Vectors of a row that a lane multiplies one after another, from its j-th on: kAtOnce of its
// kVecs.
template <typename Stored, int kVecs>
class RowVecs {
 public:
  static constexpr int kAtOnce = 2;

  __device__ __forceinline__ void load(const unsigned char* row, int j, int c, bool is_swapped) {
    load_two<kVecs>(row, j, c, is_swapped, two_);
  }
  __device__ __forceinline__ const Vec& vec(int k) const { return two_[k]; }

 private:
  Vec two_[2];
};

// Each 16 bytes are two vectors. With an odd number, 8 bytes are the last.
template <int kVecs>
class RowVecs<Fp8, kVecs> {
 public:
  static constexpr int kAtOnce = kVecs % 4 == 0 ? 4 : 2;

  __device__ __forceinline__ void load(const unsigned char* row, int j, int c, bool is_swapped) {
    if (kVecs % 2 != 0 && j == kVecs - 1) {
      const Fp8Vec last = reinterpret_cast<const Fp8Vec*>(row)[vec_of<Fp8, kVecs>(j, c)];
      two_[0].word[0] = last.word[0];
      two_[0].word[1] = last.word[1];
    } else if (kAtOnce == 4) {
      load_two<kVecs / 2>(row, j / 2, c, is_swapped, two_);
    } else {
      two_[0] = reinterpret_cast<const Vec*>(row)[line_vec(j / 2, c)];
    }
  }
  __device__ __forceinline__ Vec vec(int k) const {
    const auto& word = two_[k / 2].word;
    return CacheElement<Fp8>::unpacked({{word[k % 2 * 2], word[k % 2 * 2 + 1]}});
  }

 private:
  Vec two_[2];
};

// A tile is four groups of four tokens. The tokens of a group lie one after another in the cache,
// and one copy moves them. A dense group begins at the line after the one before it. A padded group
// begins 32 bytes later, so that lanes with different c read values of four groups at once: warps
// attend to a tile sooner, but copies are slower.
template <typename Stored, int kHeadSize>
struct Tile {
  static constexpr int kVecs = kHeadSize / 32;    // vectors of a key that a lane multiplies
  static constexpr int kRowSize = 2 * kHeadSize;  // elements of a token: key and value
  static constexpr int kRowBytes = sizeof(Stored) * kRowSize;
  static constexpr int kGroupTokens = 4;
  static constexpr int kDensePitch = kGroupTokens * kRowBytes;  // bytes from group to group
  static constexpr int kPaddedPitch = kDensePitch + 32;
  static constexpr int kBytes = kTileTokens / kGroupTokens * kPaddedPitch;
  static_assert(kDensePitch % kLineBytes == 0 && kBytes % kLineBytes == 0);

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
template <typename Stored, int kHeadSize>
__device__ __forceinline__ void copy_tile_of(unsigned char* to_shared, int pitch, const void* from,
                                             bool is_whole, Barrier& barrier) {
  using Tile = quest::cuda::Tile<Stored, kHeadSize>;
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
