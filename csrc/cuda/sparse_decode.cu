// sparse_decode: attention of one query token over a row's selected pages, or over all of them.
//
// Positions count the attended tokens of a row: those of its selected pages, page after page, or of
// its whole context. Only the last page can be partly filled. A warp attends to a tile of 16
// positions at a time:
//
//     logits  [16 positions x 8 query heads]   = keys [16 x head_size] * query^T
//     out^T   [head_size x 8 query heads]     += values^T [head_size x 16] * weights
//
// What a lane needs of a tile is copied to its own places in shared memory, keys and values in
// turn, while the tile before is attended to.
//
// A tile for each warp of a CTA is a chunk; the chunks of all rows are dealt to the CTAs
// (schedule.cuh). What a CTA's warps found for one (row, KV head) is merged in shared memory; where
// several CTAs share it, each leaves its part in the workspace, and the last to arrive merges them,
// in the CTAs' order.
//
// Bytes: 4 * head_size per attended token and KV head, each read once. Nothing else counts.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kTileTokens = 16;
constexpr int kHalfTokens = kTileTokens / 2;  // page sizes are multiples of it
constexpr int kPlannedChunks = 16;            // whose pages are looked up at a time
constexpr int kSlab = 64;                     // of the head size, merged at a time
constexpr int kSlabRow = kSlab + 4;           // in shared memory, against bank conflicts
constexpr int kMaxCtasPerMultiprocessor = 2;  // the workspace is made for

struct Chunk {
  Segment segment;
  int first_token;  // position of the chunk
  int num_tokens;   // that the row attends to
};

template <int kHeadSize, int kGroupTiles>
struct Sizes {
  static constexpr int kWarps = kHeadSize <= 128 ? 8 : 4;  // shared memory holds their tiles
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunkTokens = kWarps * kTileTokens;
  static constexpr int kHalves = kChunkTokens / kHalfTokens;  // of a chunk
  static constexpr int kHeads = 8 * kGroupTiles;              // of a query group, padded
  static constexpr int kVecs = kHeadSize / 32;                // of a key that a lane needs
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;
  static_assert(kHeadSize % 32 == 0);
  static_assert(kPlannedChunks * kHalves == kThreads);  // one lookup per thread
};

template <int kHeadSize, int kGroupTiles>
struct Shared {
  using S = Sizes<kHeadSize, kGroupTiles>;

  // Each warp's tile, and the query: what each lane needs.
  Vec keys[S::kWarps][2][S::kVecs][kWarpSize];
  Vec values[S::kWarps][S::kSlabs][4][kWarpSize];
  Vec query[kGroupTiles][S::kVecs][kWarpSize];

  // The next chunks, and where their halves of tiles begin in the cache, in elements.
  Chunk chunks[kPlannedChunks];
  int64_t halves[kPlannedChunks][S::kHalves];

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

template <typename T, int kHeadSize, int kGroupTiles>
class SparseDecode : Sizes<kHeadSize, kGroupTiles> {
 public:
  using S = Sizes<kHeadSize, kGroupTiles>;
  using SharedMemory = Shared<kHeadSize, kGroupTiles>;
  using S::kChunkTokens, S::kHalves, S::kSlabs, S::kThreads, S::kVecs, S::kWarps;

  __device__ SparseDecode(const SparseDecodeParams& p, SharedMemory& shared)
      : p_(p),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4) {}

  // A CTA's share: chunks [begin, end).
  __device__ void run(const Schedule& schedule, int begin, int end) {
    for (int planned = begin; planned < end; planned += kPlannedChunks) {
      const int num_chunks = min(kPlannedChunks, end - planned);
      plan(schedule, planned, num_chunks);

      // Stream the tiles: the next one's keys and values are on their way while one is attended to.
      copy_keys(0);
      copy_values(0);
      for (int i = 0; i < num_chunks; ++i) {
        const Chunk& chunk = shared_.chunks[i];
        const int number = planned + i, rest = remaining(i);
        if (number == begin || number == chunk.segment.first) start(chunk.segment);

        float logits[kGroupTiles][4];
        uint32_t weights[kGroupTiles][2];
        wait_for_copies_but_one_group();
        if (rest > 0) multiply_keys(logits);
        copy_keys(i + 1 < num_chunks ? i + 1 : kNoChunk);
        if (rest > 0) weigh(logits, rest, weights);
        wait_for_copies_but_one_group();
        if (rest > 0) add_values(weights);
        copy_values(i + 1 < num_chunks ? i + 1 : kNoChunk);

        if (number + 1 == end || number + 1 == chunk.segment.first + chunk.segment.count) {
          finish(schedule, chunk.segment);
        }
      }
      __syncthreads();
    }
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
  static constexpr int kNoChunk = -1;

  // Look up where the keys and values of the next chunks lie.
  __device__ void plan(const Schedule& schedule, int first, int num_chunks) {
    if (threadIdx.x < num_chunks) {
      const int number = first + threadIdx.x;
      const Segment segment = schedule.segment(number);
      shared_.chunks[threadIdx.x] = {segment, (number - segment.first) * kChunkTokens,
                                     num_tokens(p_, segment.row)};
    }
    __syncthreads();
    const int i = threadIdx.x / kHalves, half = threadIdx.x % kHalves;
    if (i < num_chunks) {
      const Chunk chunk = shared_.chunks[i];
      const int row = chunk.segment.row, head = chunk.segment.head;
      const int position = chunk.first_token + half * kHalfTokens;
      if (position < chunk.num_tokens) {
        const int page_size = p_.cache.page_size;
        int page = position / page_size;
        if (over_budget(p_.rows.seq_lens[row], p_.rows.budgets[row], page_size)) {
          page =
              load_once(p_.pages + row * p_.pages_row_stride + head * p_.pages_head_stride + page);
        }
        const int token = page * page_size + position % page_size;
        const int block = load_once(p_.rows.block_table + row * p_.rows.block_table_stride +
                                    token / p_.cache.block_tokens);
        shared_.halves[i][half] = block * p_.cache.block_stride + head * p_.cache.head_stride +
                                  token % p_.cache.block_tokens * kRowSize;
      }
    }
    __syncthreads();
  }

  // Positions from the start of this warp's tile in planned chunk i to the row's end.
  __device__ int remaining(int i) const {
    return shared_.chunks[i].num_tokens - shared_.chunks[i].first_token - warp_ * kTileTokens;
  }

  // Start of the cache row for position `half * 8 + token` of this warp's tile in planned chunk i.
  // A position past the row's end becomes one before it: its logit is masked.
  __device__ const T* cache_row(int i, int half, int token, int remaining) const {
    const int filled = remaining - half * kHalfTokens;
    const int use_half = filled > 0 ? half : 0;
    const int use_token = filled > 0 ? min(token, filled - 1) : 0;
    return static_cast<const T*>(p_.cache.data) + shared_.halves[i][2 * warp_ + use_half] +
           use_token * kRowSize;
  }

  // One group of copies. Lane 4 * r + c needs dimensions 32 * j + 8 * c onwards of the keys at
  // positions r and r + 8. Two words of it are an operand of a matrix product, which believes them
  // to be other dimensions; the query's are the same.
  __device__ void copy_keys(int i) {
    const int rest = i == kNoChunk ? 0 : remaining(i);
    if (rest > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* key = cache_row(i, half, r_, rest) + 8 * c_;
#pragma unroll
        for (int j = 0; j < kVecs; ++j)
          copy_once(&shared_.keys[warp_][half][j][lane_], key + 32 * j);
      }
    }
    commit_copies();
  }

  // One group of copies. Lane 4 * r + c needs dimensions 64 * slab + 8 * r onwards of the values at
  // positions 2c, 2c + 1, 2c + 8, 2c + 9. Past the head's end (a head size of 96) it gets others,
  // which nobody uses.
  __device__ void copy_values(int i) {
    const int rest = i == kNoChunk ? 0 : remaining(i);
    if (rest > 0) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const T* value = cache_row(i, v / 2, 2 * c_ + v % 2, rest) + kHeadSize;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const bool in_head = kHeadSize % kSlab == 0 || kSlab * slab + 8 * r_ < kHeadSize;
          copy_once(&shared_.values[warp_][slab][v][lane_],
                    value + (in_head ? kSlab * slab + 8 * r_ : 0));
        }
      }
    }
    commit_copies();
  }

  // Begin with a (row, KV head): its query, and nothing attended to.
  __device__ void start(const Segment& segment) {
    for (int i = threadIdx.x; i < kGroupTiles * kVecs * kWarpSize; i += kThreads) {
      const int lane = i % kWarpSize, j = i / kWarpSize % kVecs, tile = i / kWarpSize / kVecs;
      const int head = tile * 8 + lane / 4;
      Vec query = {};
      if (head < p_.group_size) {
        query = load_once(static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                          (segment.head * p_.group_size + head) * p_.query_head_stride + 32 * j +
                          8 * (lane % 4));
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
  __device__ void multiply_keys(float (&logits)[kGroupTiles][4]) const {
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      float sum[2][4] = {};  // two sums shorten the chain of products
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        const Vec query = shared_.query[tile][j][lane_];
        const Vec first = shared_.keys[warp_][0][j][lane_];
        const Vec second = shared_.keys[warp_][1][j][lane_];
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
  __device__ void add_values(const uint32_t (&weights)[kGroupTiles][2]) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      Vec v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = shared_.values[warp_][slab][k][lane_];
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
  __device__ void finish(const Schedule& schedule, const Segment& segment) {
    const int cta = blockIdx.x;
    const int first_cta = schedule.owner(segment.first);
    const int last_cta = schedule.owner(segment.first + segment.count - 1);
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
  const int lane_, warp_, r_, c_;

  float maximum_[kGroupTiles][2], sum_[kGroupTiles][2];  // for query heads 2c, 2c + 1
  float out_[kGroupTiles][kSlabs][4][4];
};

template <typename T, int kHeadSize, int kGroupTiles>
__global__ void __launch_bounds__(Sizes<kHeadSize, kGroupTiles>::kThreads,
                                  kHeadSize <= 128 && kGroupTiles == 1 ? 2 : 1)
    sparse_decode_kernel(const __grid_constant__ SparseDecodeParams p) {
  // grid: [CTAs that the GPU holds]; a CTA attends to its share of all chunks.
  using Decode = SparseDecode<T, kHeadSize, kGroupTiles>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<typename Decode::SharedMemory*>(shared_memory);
  int* row_end = reinterpret_cast<int*>(shared_memory + sizeof(shared));

  const Schedule schedule = Schedule::build<Decode::kThreads>(
      p.rows.num_rows, p.cache.num_kv_heads, row_end,
      [&](int row) { return max(1, div_up(Decode::num_tokens(p, row), Decode::kChunkTokens)); });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  wait_for_previous_kernel();
  release_next_kernel();
  if (begin < end) Decode(p, shared).run(schedule, begin, end);
}

}  // namespace

int max_decode_ctas() {
  return div_up(kMaxCtasPerMultiprocessor * num_multiprocessors(), 4) * 4;  // to align what follows
}

cudaError_t sparse_decode(const SparseDecodeParams& params, cudaStream_t stream) {
  return for_shape(params.cache, params.group_size, [&](auto shape) {
    using M = decltype(shape);
    using S = Sizes<M::kHeadSize, M::kGroupTiles>;
    const auto kernel = sparse_decode_kernel<typename M::Type, M::kHeadSize, M::kGroupTiles>;
    const int shared_bytes = sizeof(Shared<M::kHeadSize, M::kGroupTiles>);
    static const int held = ctas_per_multiprocessor(kernel, S::kThreads, shared_bytes);
    const int ctas = std::min(held, kMaxCtasPerMultiprocessor) * num_multiprocessors();
    return launch(kernel, ctas, S::kThreads, shared_bytes + params.rows.num_rows * sizeof(int),
                  stream, params);
  });
}

}  // namespace quest::cuda
