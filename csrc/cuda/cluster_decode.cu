// cluster_decode: score, select and sparse_decode in one launch, a cluster of CTAs for each
// (row, KV head).
//
// Each CTA scores its share of the pages. Then every CTA selects for itself, with all scores: that
// takes less time than to select together, which waits for the others again and again, as long as
// all keys fit shared memory. Each attends to its share of the chosen pages, as many as the others,
// and the results are merged over the cluster's shared memory.
//
// A long row that fits its budget would keep its cluster busy for long. Further CTAs, which have
// nothing else to do, share such rows (split_decode.cuh).
//
// Bytes: those of score and sparse_decode.
#include <algorithm>

#include "attention.cuh"
#include "cluster.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "rows.cuh"
#include "score_pages.cuh"
#include "selection.cuh"
#include "split_decode.cuh"
#include "tiles.cuh"

namespace quest::cuda {
namespace {

// CTAs that share a multiprocessor: two, where their registers and tiles have room.
template <int kHeadSize, int kGroupTiles>
constexpr int kResident = kHeadSize <= 128 && kGroupTiles == 1 ? 2 : 1;

constexpr int kListed = 512;  // pages that a CTA attends to, listed in shared memory

template <int kHeadSize, int kGroupTiles>
struct ClusterMemory {
  static constexpr int kWarps = kRings<kHeadSize>, kHeads = 8 * kGroupTiles;

  GroupQuery<kHeadSize, kGroupTiles> query;
  Barrier arrived[kWarps];
  SelectionMemory<kWarps * kWarpSize> selection;
  int32_t list[kListed];  // of pages that this CTA attends to

  float2 warp_weight[kWarps][kHeads];      // maximum (base 2) and sum of weights: of each warp
  float2 weight[kMaxClusterCtas][kHeads];  // and of each CTA, where this one merges
};

// One CTA's part in its cluster's work for a (row, KV head).
template <typename T, int kHeadSize, int kGroupTiles>
class ClusterDecode {
 public:
  using Tile = quest::cuda::Tile<kHeadSize>;
  using Memory = ClusterMemory<kHeadSize, kGroupTiles>;
  static constexpr int kWarps = Memory::kWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  static constexpr int kBlock = Selection<kThreads>::kBlock;
  static constexpr int kTileBytes = std::max(Tile::kBytes, BoundsTile<kHeadSize>::kBytes);

  // Of dynamic shared memory: [Memory, tiles [kWarps], merged [group_size, head_size], keys
  // [room]].
  static constexpr int kMergedBytes = 8 * kGroupTiles * kHeadSize * sizeof(float);
  static constexpr int kFixedBytes = sizeof(Memory) + kWarps * kTileBytes + kMergedBytes;

  __device__ ClusterDecode(const ClusterDecodeParams& params, unsigned char* shared_memory,
                           int log2_ctas, int room)
      : p_(params.decode),
        shared_(*reinterpret_cast<Memory*>(shared_memory)),
        tiles_(shared_memory + sizeof(Memory)),
        tile_(tiles_ + threadIdx.x / kWarpSize * kTileBytes),
        keys_(reinterpret_cast<uint32_t*>(shared_memory + kFixedBytes)),
        room_(room),
        merged_(reinterpret_cast<float*>(shared_memory + kFixedBytes - kMergedBytes)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4),
        log2_ctas_(log2_ctas),
        rank_(rank_in_cluster()),
        row_((blockIdx.x >> log2_ctas) / p_.cache.num_kv_heads),
        head_((blockIdx.x >> log2_ctas) % p_.cache.num_kv_heads),
        seq_len_(p_.rows.seq_lens[row_]),
        budget_(p_.rows.budgets[row_]),
        num_pages_(div_up(seq_len_, p_.cache.page_size)),
        table_(p_.rows.block_table + row_ * p_.rows.block_table_stride),
        scores_(params.scores + row_ * params.scores_row_stride +
                head_ * params.scores_head_stride) {
    // Where shared memory has no room for the list, a part of the row's in device memory is used.
    const bool is_short = div_up(budget_, ctas()) <= kListed;
    list_ = is_short ? shared_.list
                     : params.pages + row_ * p_.pages_row_stride + head_ * p_.pages_head_stride +
                           rank_ * (budget_ / ctas()) + min(rank_, budget_ % ctas());
  }

  __device__ bool is_ours() const { return !is_long_dense(seq_len_, budget_, p_.cache.page_size); }

  // Before other kernels have finished: what depends on none of them.
  __device__ void prepare() {
    if (lane_ == 0) shared_.arrived[warp_].init();
    __syncthreads();
    cluster_arrive();
    if (is_sparse()) look_up(first_tile_page());
  }

  __device__ void run() {
    if (p_.counters != nullptr && head_ == 0 && rank_ == 0 && threadIdx.x == 0) {
      count_row(p_.counters, p_.cache, seq_len_, budget_);
    }
    GroupQueryLoad<T, kHeadSize, kGroupTiles, kThreads> query(
        static_cast<const T*>(p_.query) + row_ * p_.query_row_stride +
            head_ * p_.group_size * p_.query_head_stride,
        p_.query_head_stride, p_.group_size);
    if (is_sparse()) fetch_bounds(first_tile_page());
    query.store(shared_.query);
    __syncthreads();
    cluster_wait();  // until all have begun, so that their shared memory can be written
    if (is_sparse()) {
      score();
      cluster_sync();
      select();
      __syncthreads();
    }
    attend();
  }

 private:
  __device__ bool is_sparse() const { return num_pages_ > budget_; }

  __device__ int ctas() const { return 1 << log2_ctas_; }

  // The newest page is kept whatever its score; those before it compete.
  __device__ int num_competing() const { return num_pages_ - 1; }

  // Tiles of 16 pages are dealt to the CTAs in turn.
  __device__ int first_tile_page() const { return ((warp_ << log2_ctas_) + rank_) * kTilePages; }
  __device__ int tile_step() const { return (kWarps << log2_ctas_) * kTilePages; }

  // Look up where the bounds of a tile lie, a lane one page's; beyond the last, again the last's.
  __device__ void look_up(int first_page) {
    if (first_page >= num_competing()) return;
    const int pages_per_block = p_.cache.block_tokens / p_.cache.page_size;
    const int page = min(first_page + lane_ % kTilePages, num_competing() - 1);
    const int block = pages_per_block == 1 ? page : page / pages_per_block;
    next_row_ = p_.cache.block_tokens + page - block * pages_per_block;
    next_block_ = load_once(table_ + block);
  }

  // Have them copied, and look up this warp's next ones.
  __device__ void fetch_bounds(int first_page) {
    if (first_page >= num_competing()) return;
    const T* from = static_cast<const T*>(p_.cache.data) + next_block_ * p_.cache.block_stride +
                    head_ * p_.cache.head_stride + next_row_ * 2 * kHeadSize;
    copy_bounds<kHeadSize>(tile_, from, shared_.arrived[warp_]);
    look_up(first_page + tile_step());
  }

  // Score this CTA's pages.
  __device__ void score() {
    constexpr int kVecs = kHeadSize / 32;
    Vec query[kGroupTiles][kVecs];  // heads repeated where there are too few
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      const int head = (tile * 8 + r_) % p_.group_size;
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        query[tile][j] = shared_.query[head / 8][j][head % 8 * 4 + c_];
      }
    }
#pragma unroll 1
    for (int first = first_tile_page(); first < num_competing(); first += tile_step()) {
      wait_for_tile();
      const float2 scores = score_pages<T, kHeadSize, kGroupTiles>(tile_, query);
      __syncwarp();  // before copies overwrite the tile
      fetch_bounds(first + tile_step());
      // Lanes with c = 0 write the tile's first 8 pages, with c = 1 the others.
      const int page = first + 8 * c_ + r_;
      if (c_ < 2 && page < num_competing()) scores_[page] = c_ == 0 ? scores.x : scores.y;
    }
  }

  // Wait for what was copied last.
  __device__ void wait_for_tile() {
    shared_.arrived[warp_].wait(parity_);
    parity_ ^= 1;
  }

  // Choose pages, and list those that this CTA attends to.
  __device__ void select() {
    const auto list = [&](int i, int page) {
      if ((i & (ctas() - 1)) == rank_) list_[i >> log2_ctas_] = page;
    };
    if (threadIdx.x == 0) list(budget_ - 1, num_pages_ - 1);
    if (budget_ == 1) return;
    Selection<kThreads> selection(shared_.selection, scores_, num_competing(), keys_, room_);
    selection.for_each_chosen(selection.narrow(budget_ - 1), list);
  }

  // This CTA attends to pages rank, rank + ctas, ... of those chosen, or of all. Positions count
  // their tokens; only the last page can be partly filled.
  __device__ void attend() {
    WarpAttention<T, kHeadSize, kGroupTiles> attention(shared_.query, p_.scale, p_.soft_cap);
    attention.reset();
    const int num_attended = min(num_pages_, budget_);
    const int num_ours = (num_attended - rank_ + ctas() - 1) >> log2_ctas_;
    const bool has_newest = num_attended > 0 && ((num_attended - 1) & (ctas() - 1)) == rank_;
    const int unfilled = num_pages_ * p_.cache.page_size - seq_len_;
    tokens_ = num_ours * p_.cache.page_size - (has_newest ? unfilled : 0);

    const int num_tiles = div_up(tokens_, kTileTokens);
    int tile = warp_;
    copy_tile(tile, num_tiles);
#pragma unroll 1
    for (; tile < num_tiles; tile += kWarps) {
      wait_for_tile();
      attention.attend(tile_, tokens_ - tile * kTileTokens);
      __syncwarp();  // before copies overwrite the tile
      copy_tile(tile + kWarps, num_tiles);
    }
    merge(attention);
  }

  // Look up where this warp's next tiles lie: lane l the half l % 2 of the l / 2-th.
  __device__ void plan(int first_tile) {
    planned_ = first_tile;
    const int position = (first_tile + lane_ / 2 * kWarps) * kTileTokens + lane_ % 2 * kHalfTokens;
    if (position >= tokens_) return;
    const int page_size = p_.cache.page_size, ours = position / page_size;
    const int page = is_sparse() ? list_[ours] : (ours << log2_ctas_) + rank_;
    const int token = page * page_size + position - ours * page_size;
    const int block = load_once(table_ + token / p_.cache.block_tokens);
    planned_start_ = block * p_.cache.block_stride + head_ * p_.cache.head_stride +
                     token % p_.cache.block_tokens * 2 * kHeadSize;
  }

  // Have this warp's tile copied. Lane 8 * half + token has a position; past the end it takes one
  // before it, whose logit is masked.
  __device__ void copy_tile(int tile, int num_tiles) {
    if (tile >= num_tiles) return;
    constexpr int kPlannedTiles = kWarpSize / 2;
    if (planned_ < 0 || tile == planned_ + kPlannedTiles * kWarps) plan(tile);
    const int lane = (tile - planned_) / kWarps * 2, rest = tokens_ - tile * kTileTokens;
    const int half = lane_ / kHalfTokens % 2, filled = rest - half * kHalfTokens;
    const int64_t start = __shfl_sync(kAllLanes, planned_start_, filled > 0 ? lane + half : lane);
    const int token = filled > 0 ? min(lane_ % kHalfTokens, filled - 1) : 0;
    copy_tile_of<kHeadSize>(tile_,
                            static_cast<const T*>(p_.cache.data) + start + token * 2 * kHeadSize,
                            rest >= kTileTokens, shared_.arrived[warp_]);
  }

  // Merge what the warps found, then what the CTAs found: each merges a share of the elements
  // [group_size, head_size], which the others send it.
  __device__ void merge(const WarpAttention<T, kHeadSize, kGroupTiles>& attention) {
    constexpr int kPitch = kHeadSize + 4;  // against bank conflicts
    static_assert(8 * kGroupTiles * kPitch * sizeof(float) <= kTileBytes);
    float* const values = reinterpret_cast<float*>(tile_);
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int head = tile * 8 + 2 * c_ + k;
        const float sum = attention.sum_of_weights(tile, k);
        if (r_ == 0) {
          shared_.warp_weight[warp_][head] = make_float2(attention.maximum(tile, k), sum);
        }
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const int dim = slab * kSlab + 8 * r_;
          if (head < p_.group_size && dim < kHeadSize) {
            attention.write_values(tile, slab, k, 1.0f, values + head * kPitch + dim);
          }
        }
      }
    }
    __syncthreads();

    const int share = p_.group_size * kHeadSize >> log2_ctas_;
    for (int i = 2 * threadIdx.x; i < p_.group_size * kHeadSize; i += 2 * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      float maximum = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        maximum = fmaxf(maximum, shared_.warp_weight[warp][head].x);
      }
      float2 x = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float2 weight = shared_.warp_weight[warp][head];
        const float factor = rescale(weight.x, maximum);
        const float2 y = *reinterpret_cast<const float2*>(
            reinterpret_cast<const float*>(tiles_ + warp * kTileBytes) + head * kPitch + dim);
        sum += weight.y * factor;
        x.x += y.x * factor;
        x.y += y.y * factor;
      }
      const int cta = i / share, element = i % share;
      *reinterpret_cast<float2*>(of_cta(merged_, cta) + rank_ * share + element) = x;
      // The first of a head's elements in a share bring the head's weight along.
      if (dim == 0 || element == 0) {
        of_cta(&shared_, cta)->weight[rank_][head] = make_float2(maximum, sum);
      }
    }
    cluster_sync();

    for (int i = threadIdx.x; i < share; i += kThreads) {
      const int element = rank_ * share + i, head = element / kHeadSize;
      float maximum = -INFINITY, sum = 0.0f, x = 0.0f;
#pragma unroll 4
      for (int cta = 0; cta < ctas(); ++cta) {
        maximum = fmaxf(maximum, shared_.weight[cta][head].x);
      }
#pragma unroll 4
      for (int cta = 0; cta < ctas(); ++cta) {
        const float2 weight = shared_.weight[cta][head];
        const float factor = rescale(weight.x, maximum);
        sum += weight.y * factor;
        x += merged_[cta * share + i] * factor;
      }
      T* const out = static_cast<T*>(p_.out) + row_ * p_.out_row_stride +
                     (head_ * p_.group_size + head) * p_.out_head_stride + element % kHeadSize;
      *out = Element<T>::from_float(sum == 0.0f ? 0.0f : x / sum);  // 0 for a row without tokens
    }
  }

  const SparseDecodeParams& p_;
  Memory& shared_;
  unsigned char* const tiles_;
  unsigned char* const tile_;  // this warp's
  uint32_t* const keys_;
  const int room_;
  float* const merged_;  // [CTAs, a share of the elements]
  const int lane_, warp_, r_, c_;

  const int log2_ctas_, rank_;  // of the cluster
  const int row_, head_;
  const int seq_len_, budget_, num_pages_;
  const int32_t* const table_;
  float* const scores_;

  int32_t* list_;                      // of pages that this CTA attends to
  int next_block_ = 0, next_row_ = 0;  // where this lane's next page's bounds lie
  uint32_t parity_ = 0;                // of the tile's next phase
  int tokens_ = 0;                     // that this CTA attends to
  int planned_ = -1;                   // the first planned tile
  int64_t planned_start_ = 0;          // of this lane's planned half in the cache, in elements
};

template <typename T, int kHeadSize, int kGroupTiles>
__global__ void __launch_bounds__(ClusterDecode<T, kHeadSize, kGroupTiles>::kThreads,
                                  kResident<kHeadSize, kGroupTiles>)
    cluster_decode_kernel(const __grid_constant__ ClusterDecodeParams p, int log2_ctas, int room) {
  // grid: [rows, KV heads, CTAs of a cluster], then CTAs for long dense rows.
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Rows& rows = p.decode.rows;
  const int clustered = rows.num_rows * p.decode.cache.num_kv_heads << log2_ctas;
  if (static_cast<int>(blockIdx.x) >= clustered) {
    using Split = SplitDecode<T, kHeadSize, kGroupTiles>;
    const auto is_ours = [&](int row) {
      return is_long_dense(rows.seq_lens[row], rows.budgets[row], p.decode.cache.page_size);
    };
    bool has_work = false;
    for (int row = threadIdx.x; row < rows.num_rows; row += Split::kThreads) {
      has_work = has_work || is_ours(row);
    }
    if (!__syncthreads_or(has_work)) return;
    Split::attend(p.decode, shared_memory, 1, blockIdx.x - clustered, gridDim.x - clustered,
                  is_ours);
    return;
  }
  ClusterDecode<T, kHeadSize, kGroupTiles> decode(p, shared_memory, log2_ctas, room);
  const bool is_ours = decode.is_ours();
  if (is_ours) decode.prepare();
  wait_for_previous_kernel();
  release_next_kernel();
  if (is_ours) decode.run();
#endif
}

template <typename M>
struct Launcher {
  using Decode = ClusterDecode<typename M::Type, M::kHeadSize, M::kGroupTiles>;
  using Split = SplitDecode<typename M::Type, M::kHeadSize, M::kGroupTiles>;
  static constexpr auto kernel =
      cluster_decode_kernel<typename M::Type, M::kHeadSize, M::kGroupTiles>;

  // What the current device has room for.
  struct Limits {
    int shared_bytes;                   // of a CTA
    int clusters[kMaxClusterLog2 + 1];  // at a time, by log2 of their CTAs
  };

  static cudaLaunchConfig_t config(int clusters, int log2_ctas, int shared_bytes,
                                   cudaStream_t stream, cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {1u << log2_ctas, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters << log2_ctas);
    config.blockDim = dim3(Decode::kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
  }

  static const Limits& limits() {
    static const Limits found = find_limits();
    return found;
  }

  static Limits find_limits() {
    Limits limits = {};
    limits.shared_bytes = shared_memory_for(kernel, kResident<M::kHeadSize, M::kGroupTiles>);
    if (limits.shared_bytes < Decode::kFixedBytes ||
        limits.shared_bytes < Split::shared_bytes(1, kMaxRows)) {
      return {};
    }
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (int log2_ctas = 0; log2_ctas <= kMaxClusterLog2; ++log2_ctas) {
      cudaLaunchAttribute attributes[2];
      const auto one = config(1, log2_ctas, limits.shared_bytes, nullptr, attributes);
      if (cudaOccupancyMaxActiveClusters(&limits.clusters[log2_ctas], kernel, &one) !=
          cudaSuccess) {
        limits.clusters[log2_ctas] = 0;
        cudaGetLastError();  // clusters of this size do not exist here
      }
    }
    return limits;
  }

  // Keys that shared memory has room for, in whole blocks.
  static int room() {
    if (limits().clusters[0] == 0) return 0;
    const int keys = (limits().shared_bytes - Decode::kFixedBytes) / int{sizeof(uint32_t)};
    return keys / Decode::kBlock * Decode::kBlock;
  }

  // In the largest clusters that all run at once.
  static cudaError_t launch(const ClusterDecodeParams& params, cudaStream_t stream) {
    const Limits& limits = Launcher::limits();
    if (limits.clusters[0] == 0) return cudaErrorInvalidConfiguration;
    const int pairs = params.decode.rows.num_rows * params.decode.cache.num_kv_heads;
    int log2_ctas = 0;
    while (log2_ctas < kMaxClusterLog2 && limits.clusters[log2_ctas + 1] >= pairs) ++log2_ctas;
    const int more = max_decode_ctas() >> log2_ctas;  // for long dense rows
    cudaLaunchAttribute attributes[2];
    const auto all = config(pairs + more, log2_ctas, limits.shared_bytes, stream, attributes);
    return cudaLaunchKernelEx(&all, kernel, params, log2_ctas, room());
  }
};

}  // namespace

int max_cluster_pages(const KvCache& cache, int group_size) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  int pages = 0;
  for_shape(cache, group_size, [&](auto shape) {
    pages = Launcher<decltype(shape)>::room();
    return cudaSuccess;
  });
  return pages;
}

cudaError_t cluster_decode(const ClusterDecodeParams& params, cudaStream_t stream) {
  return for_shape(params.decode.cache, params.decode.group_size,
                   [&](auto shape) { return Launcher<decltype(shape)>::launch(params, stream); });
}

}  // namespace quest::cuda
