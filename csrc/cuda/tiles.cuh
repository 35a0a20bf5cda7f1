// Tiles: 16 rows of the cache that a warp has copied to shared memory, some ahead of their use.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace quest::cuda {

constexpr int kTileRows = 16;

// Warps of a CTA, with a ring of tiles each: as many as leave room for a tile each and the rest
// where a CTA has 99 KB of shared memory (sm_86, sm_89, sm_120).
template <int kHeadSize>
constexpr int kRings = kHeadSize <= 128 ? 8 : 4;

template <int kHeadSize>
struct Tile {
  static constexpr int kVecs = kHeadSize / 32;     // of a row's half that a lane multiplies
  static constexpr int kRowBytes = 4 * kHeadSize;  // key and value, or minimum and maximum
  static constexpr int kPitch = kRowBytes + 16;    // against bank conflicts
  static constexpr int kBytes = kTileRows * kPitch;
  static_assert(kHeadSize % 32 == 0);

  // Which 16 bytes of a row's half lane 4 * r + c multiplies j-th. Two words of them are an operand
  // of a matrix product, which believes them to be other columns; the query's are the same. In this
  // order, eight neighbouring lanes read 8 different places modulo 128 bytes.
  static __device__ constexpr int vec(int j, int c) {
    return (j | 1) < kVecs ? j / 2 * 8 + 2 * c + j % 2 : j * 4 + c;
  }
};

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
