// sparse_decode: attention of one query token over a row's selected pages, or over all of them.
//
// Positions count the attended tokens of a row: those of its selected pages, page after page, or of
// its whole context. Only the last page can be partly filled. A warp attends to a tile of 16
// positions at a time:
//
//     logits  [16 positions x 8 query heads]   = keys [16 x head_size] * query^T
//     out^T   [head_size x 8 query heads]     += values^T [head_size x 16] * weights
//
// Each warp has a ring of tiles in shared memory: while it attends to one, the next are on their
// way.
//
// A tile for each warp of a CTA is a chunk; the chunks of all rows are dealt to the CTAs
// (schedule.cuh). What a CTA's warps found for one (row, KV head) is merged in shared memory; where
// several CTAs share it, each leaves its part in the workspace, and the last to arrive merges them,
// in the CTAs' order.
//
// Bytes: 4 * head_size per attended token and KV head, each read once. Nothing else counts.
#include <algorithm>

#include "../counters.h"
#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "tiles.cuh"

namespace quest::cuda {
namespace {

constexpr int kTileTokens = kTileRows;
constexpr int kHalfTokens = kTileTokens / 2;  // page sizes are multiples of it
constexpr int kSlab = 64;                     // of the head size, merged at a time
constexpr int kSlabRow = kSlab + 4;           // in shared memory, against bank conflicts

// On an H200, 1 CTA of 8 warps, with 2 stages or more, is the fastest or within 2% of it. 2 CTAs of
// 4 warps are as fast where rows are many, and slower where they are few.
constexpr int kCtasPerMultiprocessor = 1;
constexpr int kMaxStages = 3;  // tiles in a warp's ring

template <int kHeadSize, int kGroupTiles>
struct Sizes {
  static constexpr int kWarps = kRings<kHeadSize>;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunkTokens = kWarps * kTileTokens;
  static constexpr int kHeads = 8 * kGroupTiles;        // of a query group, padded
  static constexpr int kVecs = Tile<kHeadSize>::kVecs;  // of a key that a lane needs
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  static constexpr int kRowBytes = Tile<kHeadSize>::kRowBytes;  // a key and a value
  static constexpr int kPitch = Tile<kHeadSize>::kPitch;
  static constexpr int kTileBytes = Tile<kHeadSize>::kBytes;
};

template <typename S, int kGroupTiles>
struct Shared {
  Vec query[kGroupTiles][S::kVecs][kWarpSize];  // what each lane needs
  Barrier arrived[S::kWarps][kMaxStages];       // a warp's tiles

  // What the warps found for one (row, KV head).
  float warp_maximum[S::kWarps][S::kHeads], warp_sum[S::kWarps][S::kHeads];
  float sum[S::kHeads];
  alignas(16) float slab[S::kWarps][8][kSlabRow];  // a part of out^T
  bool is_last;
};

// exp2(maximum - new_maximum): what weights become when their maximum changes.
__device__ __forceinline__ float rescale(float maximum, float new_maximum) {
  return maximum == -INFINITY ? 0.0f : exp2_fast(maximum - new_maximum);
}

template <typename T, int kHeadSize, int kGroupTiles, typename S>
class SparseDecode {
 public:
  using SharedMemory = Shared<S, kGroupTiles>;
  static constexpr int kChunkTokens = S::kChunkTokens, kSlabs = S::kSlabs, kThreads = S::kThreads;
  static constexpr int kVecs = S::kVecs, kWarps = S::kWarps;

  // `tiles`: [stages, kWarps] rings in shared memory.
  __device__ SparseDecode(const SparseDecodeParams& p, SharedMemory& shared, unsigned char* tiles,
                          int stages, const Schedule& schedule, int begin, int end)
      : p_(p),
        shared_(shared),
        tiles_(tiles),
        stages_(stages),
        schedule_(schedule),
        begin_(begin),
        end_(end),
        planned_(begin - kPlannedTiles),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4) {}

  // Attend to a CTA's share: chunks [begin, end).
  __device__ void run() {
    for (int number = begin_; number < min(end_, begin_ + stages_); ++number) copy_tile(number);

    Segment segment;
    int tokens = 0;
    for (int number = begin_; number < end_; ++number) {
      if (number == begin_ || number == segment.first + segment.count) {
        segment = schedule_.segment(number);
        tokens = num_tokens(p_, segment.row);
        start(segment);
      }
      const int rest = remaining(tokens, number - segment.first);
      if (rest > 0) {
        shared_.arrived[warp_][attended_.stage].wait(attended_.parity);
        attend(tiles_ + (attended_.stage * kWarps + warp_) * S::kTileBytes, rest);
        attended_.advance(stages_);
        __syncwarp();  // before copies overwrite the tile
      }
      if (number + stages_ < end_) copy_tile(number + stages_);
      if (number + 1 == end_ || number + 1 == segment.first + segment.count) finish(segment);
    }
  }

  // Add what a row reads, in all its KV heads, to the counters: one thread of the grid.
  static __device__ void count_row(const SparseDecodeParams& p, int row) {
    const int seq_len = p.rows.seq_lens[row], budget = p.rows.budgets[row];
    if (seq_len == 0) return;
    const auto add = [&](int counter, int64_t n) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.counters) + counter,
                static_cast<unsigned long long>(n * p.cache.num_kv_heads));
    };
    const int pages = div_up(seq_len, p.cache.page_size);
    const bool is_sparse = pages > budget;
    add(is_sparse ? kSparseRows : kDenseRows, 1);
    if (is_sparse) add(kPagesScored, pages);
    add(kPagesRead, min(pages, budget));
    add(kPagesFull, pages);
  }

  // Tokens that a row attends to.
  static __device__ int num_tokens(const SparseDecodeParams& p, int row) {
    const int seq_len = p.rows.seq_lens[row], budget = p.rows.budgets[row];
    const int pages = div_up(seq_len, p.cache.page_size);
    const int unselected = max(0, pages - budget);  // the newest, perhaps partial, is selected
    return seq_len - unselected * p.cache.page_size;
  }

 private:
  static constexpr int kRowSize = 2 * kHeadSize;
  static constexpr int kPlannedTiles = kWarpSize / 2;  // a lane looks up one half of a tile

  // Positions from the start of this warp's tile to the row's end, in a (row, KV head)'s chunk.
  __device__ int remaining(int tokens, int chunk) const {
    return tokens - chunk * kChunkTokens - warp_ * kTileTokens;
  }

  // Look up where this warp's next tiles lie: lane l the half l % 2 of the tile in chunk
  // `first` + l / 2.
  __device__ void plan(int first) {
    planned_ = first;
    planned_rest_ = 0;
    const int number = first + lane_ / 2, half = lane_ % 2;
    if (number >= end_) return;
    const Segment segment = schedule_.segment(number);
    const int row = segment.row, head = segment.head, page_size = p_.cache.page_size;
    const int tokens = num_tokens(p_, row);
    planned_rest_ = remaining(tokens, number - segment.first);
    if (planned_rest_ <= half * kHalfTokens) return;
    const int position = tokens - planned_rest_ + half * kHalfTokens;
    int page = position / page_size;
    if (over_budget(p_.rows.seq_lens[row], p_.rows.budgets[row], page_size)) {
      page = load_once(p_.pages + row * p_.pages_row_stride + head * p_.pages_head_stride + page);
    }
    const int token = page * page_size + position % page_size;
    const int block = load_once(p_.rows.block_table + row * p_.rows.block_table_stride +
                                token / p_.cache.block_tokens);
    planned_start_ = block * p_.cache.block_stride + head * p_.cache.head_stride +
                     token % p_.cache.block_tokens * kRowSize;
  }

  // Have this warp's tile of a chunk copied. Lane 8 * half + token has a position; past the row's
  // end it takes one before it, whose logit is masked.
  __device__ void copy_tile(int number) {
    if (number == planned_ + kPlannedTiles) plan(number);
    const int lane = 2 * (number - planned_);
    const int rest = __shfl_sync(kAllLanes, planned_rest_, lane);
    if (rest <= 0) return;
    const int half = lane_ / kHalfTokens % 2, filled = rest - half * kHalfTokens;
    const int64_t start = __shfl_sync(kAllLanes, planned_start_, filled > 0 ? lane + half : lane);
    const int token = filled > 0 ? min(lane_ % kHalfTokens, filled - 1) : 0;
    copy_rows<kTileTokens, S::kRowBytes, S::kPitch>(
        tiles_ + (copied_.stage * kWarps + warp_) * S::kTileBytes,
        static_cast<const T*>(p_.cache.data) + start + token * kRowSize,
        shared_.arrived[warp_][copied_.stage]);
    copied_.advance(stages_);
  }

  __device__ void attend(const unsigned char* tile, int rest) {
    float logits[kGroupTiles][4];
    uint32_t weights[kGroupTiles][2];
    multiply_keys(tile, logits);
    weigh(logits, rest, weights);
    add_values(tile, weights);
  }

  // Begin with a (row, KV head): its query, and nothing attended to.
  __device__ void start(const Segment& segment) {
    for (int i = threadIdx.x; i < kGroupTiles * kVecs * kWarpSize; i += kThreads) {
      const int lane = i % kWarpSize, j = i / kWarpSize % kVecs, tile = i / kWarpSize / kVecs;
      const int head = tile * 8 + lane / 4;
      Vec query = {};
      if (head < p_.group_size) {
        query = load_once(static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                          (segment.head * p_.group_size + head) * p_.query_head_stride +
                          Vec::kElements * Tile<kHeadSize>::vec(j, lane % 4));
      }
      shared_.query[tile][j][lane] = query;
    }
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        maximum_[tile][k] = -INFINITY;
        sum_[tile][k] = 0.0f;
      }
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
#pragma unroll
          for (int k = 0; k < 4; ++k) out_[tile][slab][w][k] = 0.0f;
        }
      }
    }
    __syncthreads();
  }

  // Lane 4 * r + c gets the logits of positions r (first two) and r + 8 (last two) for query heads
  // 2c, 2c + 1.
  __device__ void multiply_keys(const unsigned char* tile_rows,
                                float (&logits)[kGroupTiles][4]) const {
    const unsigned char* rows = tile_rows + r_ * S::kPitch;
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      float sum[2][4] = {};  // two sums shorten the chain of products
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        const Vec query = shared_.query[tile][j][lane_];
        const auto* key = reinterpret_cast<const Vec*>(rows) + Tile<kHeadSize>::vec(j, c_);
        const Vec first = key[0];
        const Vec second = key[kHalfTokens * S::kPitch / sizeof(Vec)];
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const MatrixA keys = {
              {{first.word[w], first.word[w + 1]}, {second.word[w], second.word[w + 1]}}};
          Element<T>::mma(sum[w / 2], keys, query.word[w], query.word[w + 1]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) logits[tile][k] = sum[0][k] + sum[1][k];
    }
  }

  // Online softmax, base 2: from logits to weights, laid out as the second product's operand.
  __device__ void weigh(float (&logits)[kGroupTiles][4], int remaining,
                        uint32_t (&weights)[kGroupTiles][2]) {
    constexpr float kLog2E = 1.44269504088896340736f;
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      float (&x)[4] = logits[tile];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (p_.soft_cap > 0.0f) {
          const float y = exp2_fast(x[k] * (p_.scale / p_.soft_cap) * (2.0f * kLog2E));
          x[k] = p_.soft_cap * (1.0f - __fdividef(2.0f, 1.0f + y)) * kLog2E;  // of the tangent
        } else {
          x[k] *= p_.scale * kLog2E;
        }
        if (r_ + k / 2 * kHalfTokens >= remaining) x[k] = -INFINITY;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float maximum = fmaxf(x[k], x[k + 2]);
#pragma unroll
        for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
          maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, lanes));
        }
        maximum = fmaxf(maximum, maximum_[tile][k]);
        const float factor = rescale(maximum_[tile][k], maximum);
        maximum_[tile][k] = maximum;
        x[k] = rescale(x[k], maximum);
        x[k + 2] = rescale(x[k + 2], maximum);
        sum_[tile][k] = sum_[tile][k] * factor + x[k] + x[k + 2];
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            out_[tile][slab][w][k] *= factor;
            out_[tile][slab][w][k + 2] *= factor;
          }
        }
      }
      weights[tile][0] = transpose_8x8(pack<T>(x[0], x[1]));
      weights[tile][1] = transpose_8x8(pack<T>(x[2], x[3]));
    }
  }

  // out_[tile][slab][w]: lane 4 * r + c has dimensions 64 * slab + 8 * r + 2w (first two) and the
  // next (last two) for query heads 2c, 2c + 1.
  __device__ void add_values(const unsigned char* tile_rows,
                             const uint32_t (&weights)[kGroupTiles][2]) {
    const unsigned char* rows = tile_rows + 2 * c_ * S::kPitch + S::kRowBytes / 2;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int vec = slab * kSlab / Vec::kElements + r_;  // past the head's end: anything
      const bool in_head = kHeadSize % kSlab == 0 || vec * Vec::kElements < kHeadSize;
      Vec v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // positions 2c, 2c + 1, 2c + 8, 2c + 9
        const int row = k / 2 * kHalfTokens + k % 2;
        v[k] = reinterpret_cast<const Vec*>(rows + row * S::kPitch)[in_head ? vec : 0];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const MatrixA values = {
            {{pack_low(v[0].word[w], v[1].word[w]), pack_low(v[2].word[w], v[3].word[w])},
             {pack_high(v[0].word[w], v[1].word[w]), pack_high(v[2].word[w], v[3].word[w])}}};
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
          Element<T>::mma(out_[tile][slab][w], values, weights[tile][0], weights[tile][1]);
        }
      }
    }
  }

  // Merge what the warps found for a (row, KV head): write it, if this is all of it, or leave it.
  __device__ void finish(const Segment& segment) {
    const int cta = blockIdx.x;
    const int first_cta = schedule_.owner(segment.first);
    const int last_cta = schedule_.owner(segment.first + segment.count - 1);
    const bool is_whole = first_cta == last_cta;

    // Exchange maxima and sums.
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float sum = sum_[tile][k];
#pragma unroll
        for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        }
        if (r_ == 0) {
          shared_.warp_maximum[warp_][tile * 8 + 2 * c_ + k] = maximum_[tile][k];
          shared_.warp_sum[warp_][tile * 8 + 2 * c_ + k] = sum;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < p_.group_size) {
      const float2 weight = merge_warp_sums(threadIdx.x);
      shared_.sum[threadIdx.x] = weight.y;
      if (!is_whole) {
        const int64_t row = part(cta, cta == first_cta) * p_.group_size + threadIdx.x;
        reinterpret_cast<float2*>(p_.partial_weight)[row] = weight;
      }
    }
    float factor[kGroupTiles][2];
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float maximum = maximum_of_warps(tile * 8 + 2 * c_ + k);
        factor[tile][k] = rescale(maximum_[tile][k], maximum);
      }
    }

    // Add up the weighted values, slab by slab.
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      const int num_heads = min(8, p_.group_size - 8 * tile);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (2 * c_ + k >= num_heads) continue;
          float4* to = reinterpret_cast<float4*>(&shared_.slab[warp_][2 * c_ + k][8 * r_]);
          const float (&x)[4][4] = out_[tile][slab];
          const float f = factor[tile][k];
          to[0] = make_float4(x[0][k] * f, x[0][k + 2] * f, x[1][k] * f, x[1][k + 2] * f);
          to[1] = make_float4(x[2][k] * f, x[2][k + 2] * f, x[3][k] * f, x[3][k + 2] * f);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < num_heads * kSlab; i += kThreads) {
          const int head = tile * 8 + i / kSlab, dim = slab * kSlab + i % kSlab;
          if (kHeadSize % kSlab != 0 && dim >= kHeadSize) continue;
          float x = 0.0f;
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) x += shared_.slab[warp][i / kSlab][i % kSlab];
          if (is_whole) {
            write_out(segment, head, dim, x, shared_.sum[head]);
          } else {
            const int64_t row = part(cta, cta == first_cta) * p_.group_size + head;
            p_.partial_out[row * kHeadSize + dim] = x;
          }
        }
        __syncthreads();
      }
    }
    if (!is_whole) arrive(segment, first_cta, last_cta);
  }

  // Which of the partial results a CTA leaves: its share can begin in one (row, KV head) and end in
  // another.
  static __device__ int64_t part(int cta, bool starts_here) { return 2 * cta + starts_here; }

  __device__ float maximum_of_warps(int head) const {
    float maximum = -INFINITY;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      maximum = fmaxf(maximum, shared_.warp_maximum[warp][head]);
    }
    return maximum;
  }

  // Maximum and sum of a query head's weights over all warps.
  __device__ float2 merge_warp_sums(int head) const {
    const float maximum = maximum_of_warps(head);
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += shared_.warp_sum[warp][head] * rescale(shared_.warp_maximum[warp][head], maximum);
    }
    return make_float2(maximum, sum);
  }

  // Say that this CTA has left its part; the last one merges all.
  __device__ void arrive(const Segment& segment, int first_cta, int last_cta) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      shared_.is_last = atomicAdd(&p_.arrivals[first_cta], 1) == last_cta - first_cta;
    }
    __syncthreads();
    if (!shared_.is_last) return;
    __threadfence();

    constexpr int kLoad = 4;
    for (int i = kLoad * threadIdx.x; i < p_.group_size * kHeadSize; i += kLoad * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      float maximum = -INFINITY, sum = 0.0f, out[kLoad] = {};
#pragma unroll 8
      for (int cta = first_cta; cta <= last_cta; ++cta) {
        const int64_t row = part(cta, cta == first_cta) * p_.group_size + head;
        const float2 weight = load_once(reinterpret_cast<const float2*>(p_.partial_weight) + row);
        const float4 values =
            load_once(reinterpret_cast<const float4*>(p_.partial_out + row * kHeadSize + dim));
        const float new_maximum = fmaxf(maximum, weight.x);
        const float old_factor = rescale(maximum, new_maximum);
        const float factor = rescale(weight.x, new_maximum);
        maximum = new_maximum;
        sum = sum * old_factor + weight.y * factor;
        out[0] = out[0] * old_factor + values.x * factor;
        out[1] = out[1] * old_factor + values.y * factor;
        out[2] = out[2] * old_factor + values.z * factor;
        out[3] = out[3] * old_factor + values.w * factor;
      }
#pragma unroll
      for (int k = 0; k < kLoad; ++k) write_out(segment, head, dim + k, out[k], sum);
    }
    if (threadIdx.x == 0) p_.arrivals[first_cta] = 0;
  }

  // A row without tokens has no weights: its output is 0.
  __device__ void write_out(const Segment& segment, int head, int dim, float x, float sum) const {
    T* out = static_cast<T*>(p_.out) + segment.row * p_.out_row_stride +
             (segment.head * p_.group_size + head) * p_.out_head_stride + dim;
    *out = Element<T>::from_float(sum == 0.0f ? 0.0f : x / sum);
  }

  const SparseDecodeParams& p_;
  SharedMemory& shared_;
  unsigned char* const tiles_;
  const int stages_;
  const Schedule& schedule_;
  const int begin_, end_;

  Place copied_, attended_;    // the next tiles of this warp
  int planned_;                // chunk of the first planned tile
  int planned_rest_ = 0;       // positions from the start of this lane's planned tile
  int64_t planned_start_ = 0;  // of its half in the cache, in elements

  const int lane_, warp_, r_, c_;

  float maximum_[kGroupTiles][2], sum_[kGroupTiles][2];  // for query heads 2c, 2c + 1
  float out_[kGroupTiles][kSlabs][4][4];
};

template <typename T, int kHeadSize, int kGroupTiles, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    sparse_decode_kernel(const __grid_constant__ SparseDecodeParams p, int stages) {
  // grid: [CTAs that the GPU holds]; a CTA attends to its share of all chunks.
  using Decode = SparseDecode<T, kHeadSize, kGroupTiles, S>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<typename Decode::SharedMemory*>(shared_memory);
  unsigned char* tiles = shared_memory + sizeof(shared);
  int* row_end = reinterpret_cast<int*>(tiles + stages * S::kWarps * S::kTileBytes);

  if (threadIdx.x < S::kWarps * stages) {
    shared.arrived[threadIdx.x / stages][threadIdx.x % stages].init();
  }
  const Schedule schedule = Schedule::build<S::kThreads>(
      p.rows.num_rows, p.cache.num_kv_heads, row_end,
      [&](int row) { return max(1, div_up(Decode::num_tokens(p, row), S::kChunkTokens)); });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  wait_for_previous_kernel();
  release_next_kernel();
  if (p.counters != nullptr && threadIdx.x == 0) {
    for (int row = blockIdx.x; row < p.rows.num_rows; row += gridDim.x) Decode::count_row(p, row);
  }
  if (begin < end) Decode(p, shared, tiles, stages, schedule, begin, end).run();
}

template <typename M>
cudaError_t launch_decode(const SparseDecodeParams& params, cudaStream_t stream) {
  using S = Sizes<M::kHeadSize, M::kGroupTiles>;
  const auto kernel = sparse_decode_kernel<typename M::Type, M::kHeadSize, M::kGroupTiles, S>;
  static const int room = shared_memory_for(kernel, kCtasPerMultiprocessor);
  const int fixed = sizeof(Shared<S, M::kGroupTiles>) + params.rows.num_rows * sizeof(int);
  const int stage = S::kWarps * S::kTileBytes;
  const int stages = std::min(kMaxStages, (room - fixed) / stage);
  if (stages < 1) return cudaErrorInvalidConfiguration;
  return launch(kernel, kCtasPerMultiprocessor * num_multiprocessors(), S::kThreads,
                fixed + stages * stage, stream, params, stages);
}

}  // namespace

int max_decode_ctas() {
  return div_up(kCtasPerMultiprocessor * num_multiprocessors(), 4) * 4;  // to align what follows
}

cudaError_t sparse_decode(const SparseDecodeParams& params, cudaStream_t stream) {
  return for_shape(params.cache, params.group_size,
                   [&](auto shape) { return launch_decode<decltype(shape)>(params, stream); });
}

}  // namespace quest::cuda
