// cluster_decode: the sizes of a CTA, and the plan of its shared memory.
#pragma once

#include <algorithm>

#include "../attention.cuh"
#include "../cluster.cuh"
#include "../score_pages.cuh"
#include "../selection.cuh"
#include "../tiles.cuh"

namespace quest::cuda {

constexpr int kTableEntries = 1024;  // entries of a row's block table in shared memory

// Pages of a row with far keys for each page of a row without: a page's bit in the bitmap takes the
// place of its key. See DESIGN.md, "Far keys".
constexpr int kFarFactor = 8 * sizeof(uint32_t);

// A warp's message to all CTAs of its cluster about the pages that it has scored.
struct alignas(16) WarpPages {
  KeyRange range;
  int32_t best;  // the page that the warp copies before pages are chosen; -1: none
};

// The plan of a CTA's dynamic shared memory:
//
//     [Memory, merged, tiles [stages, kWarps], messages [max_ctas(stages)], keys [room],
//      bitmap [key_groups(room)]]
//
// An fp8 cache has twice as many stages of half the size, and tiles [kWarps, stages]: a warp's
// result takes its first two.
//
// Offsets count bytes. For a row with far keys the bitmap takes the place of the keys.
template <typename Stored, int kHeadSize, int kGroupTiles>
struct ClusterLayout {
  static constexpr int kWarps = kWarpsFor<kHeadSize>, kThreads = kWarps * kWarpSize;
  // Two CTAs, where registers and tiles have room. The kernel with far keys has one.
  static constexpr int kCtasPerMultiprocessor = kHeadSize <= 128 && kGroupTiles == 1 ? 2 : 1;
  static constexpr int kHeads = 8 * kGroupTiles;  // query heads of a padded group
  // Tiles in a warp's ring, with two CTAs on a multiprocessor and with one.
  static constexpr int kMinStages = sizeof(__half) / sizeof(Stored);
  static constexpr int kMaxStages = 2 * kMinStages;
  static_assert(kWarps * kMaxClusterCtas <= kThreads);  // a thread to each warp of a cluster

  // Barriers stay at the start, and nothing else takes their place: racecheck reports a second
  // barrier at one address as a race.
  struct alignas(16) Barriers {
    Barrier tiles[kWarps][kMaxStages];  // the warps' rings
    Barrier scores;                     // messages of all CTAs: keys and WarpPages
    Barrier parts;                      // messages of all CTAs: values and states to merge
  };

  struct alignas(kLineBytes) Memory {
    Barriers arrived;
    GroupQuery<Stored, kHeadSize, kGroupTiles> query;
    uint32_t best_chosen[kWarps];  // a bit for each warp of the cluster: its best page is chosen
    SelectionMemory<kThreads> selection;
    int32_t table[kTableEntries];
    union {
      float totals[kHeads];                     // what all pages weigh, until they are chosen
      SoftmaxState warp_state[kWarps][kHeads];  // when they are attended to
    };
  };

  // A CTA's messages to all CTAs of its cluster.
  struct Messages {
    WarpPages warps[kWarps];
    SoftmaxState state[kHeads];  // states of the heads in the receiver's share
  };

  // A warp's tile. At the end its first kMinStages hold the warp's result, [kHeads, kResultPitch]
  // fp32; the pitch avoids bank conflicts.
  static constexpr int kResultPitch = kHeadSize + 4;
  static constexpr int kResultBytes = kHeads * kResultPitch * sizeof(float);
  static constexpr int kTileBytes =
      std::max({Tile<Stored, kHeadSize>::kBytes, BoundsTile<Stored, kHeadSize>::kPaddedBytes,
                kResultBytes / kMinStages});
  static_assert(kTileBytes % kLineBytes == 0 && kMinStages * kTileBytes >= kResultBytes);

  // Where a warp's tile lies, in tiles.
  __device__ static int place_of(int warp, int stage, int stages) {
    return kIsFp8<Stored> ? warp * stages + stage : stage * kWarps + warp;
  }

  // The parts that all CTAs send to this one: [ctas, share] fp32.
  static constexpr int kMergedBytes = (kHeads * kHeadSize + 2 * kMaxClusterCtas) * sizeof(float);
  static_assert(kMergedBytes % kLineBytes == 0);

  // A share: the elements [group_size, head_size] that one CTA merges, an even number.
  __host__ __device__ static constexpr int share_of(int group_size, int ctas) {
    return (group_size * kHeadSize + 2 * ctas - 1) / (2 * ctas) * 2;
  }

  // CTAs of a cluster. With the fewest stages, clusters have one CTA (see ClusterLauncher).
  __host__ __device__ static constexpr int max_ctas(int stages) {
    return stages == kMinStages ? 1 : kMaxClusterCtas;
  }

  __host__ __device__ static constexpr int merged() { return sizeof(Memory); }
  __host__ __device__ static constexpr int tiles() { return merged() + kMergedBytes; }
  __host__ __device__ static constexpr int messages(int stages) {
    return tiles() + stages * kWarps * kTileBytes;
  }
  __host__ __device__ static constexpr int keys(int stages) {
    return messages(stages) + max_ctas(stages) * static_cast<int>(sizeof(Messages));
  }

  // Pages whose keys and marks have room.
  static constexpr int room(int shared_bytes, int stages) {
    constexpr int kGroupBytes = kGroupKeys * sizeof(uint32_t) + sizeof(uint4);
    return (shared_bytes - keys(stages)) / kGroupBytes * kGroupKeys;
  }
};

}  // namespace quest::cuda
