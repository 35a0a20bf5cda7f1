// What a warp does with a tile of keys and values: 16 positions of one (row, KV head), for its
// query group.
//
//     logits  [16 positions x 8 query heads]   = keys [16 x head_size] * query^T
//     out^T   [head_size x 8 query heads]     += values^T [head_size x 16] * weights
//
// Online softmax, in fp32.
#pragma once

#include <bit>

#include "device.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace quest::cuda {

// Dimensions of the head that a warp's lanes hold at once, 8 in each lane of equal c.
constexpr int kSlab = 64;

// A query group, padded to kGroupTiles * 8 heads, in the order in which lanes read it: element
// [g][j][4 * r + c] is vector vec_of(j, c) of query head 8 * g + r.
template <int kHeadSize, int kGroupTiles>
using GroupVecs = Vec[kGroupTiles][kHeadSize / 32][kWarpSize];

// The group for an fp8 cache: fp16, what each head was divided by (divide_to_halves), and what the
// products with keys are multiplied with, the keys' scale included.
template <int kHeadSize, int kGroupTiles>
struct HalfGroupQuery {
  GroupVecs<kHeadSize, kGroupTiles> vecs;
  float divisor[8 * kGroupTiles], key_factor[8 * kGroupTiles];

  __device__ const auto& operator[](int tile) const { return vecs[tile]; }
};

template <typename Stored, int kHeadSize, int kGroupTiles>
using GroupQuery = std::conditional_t<kIsFp8<Stored>, HalfGroupQuery<kHeadSize, kGroupTiles>,
                                      GroupVecs<kHeadSize, kGroupTiles>>;

// All threads of a CTA load a query group, [group_size, head_size], with zeros for the heads that
// pad it. It arrives in registers, so other work can begin before it is stored in shared memory.
template <typename T, int kHeadSize, int kGroupTiles, int kThreads>
class SameGroupQueryLoad {
 public:
  __device__ void load(const T* query, int64_t head_stride, int group_size, const KvScales&) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const unsigned i = threadIdx.x + k * kThreads;  // unsigned: cheaper to divide
      const unsigned lane = i % kWarpSize, j = i / kWarpSize % kVecs, tile = i / kWarpSize / kVecs;
      const int head = tile * 8 + lane / 4;
      vecs_[k] = {};
      if (i < kTotal && head < group_size) {
        vecs_[k] =
            load_once(query + head * head_stride + Vec::kElements * vec_of<T, kVecs>(j, lane % 4));
      }
    }
  }

  __device__ void store(GroupVecs<kHeadSize, kGroupTiles>& to) const {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i < kTotal) (&to[0][0][0])[i] = vecs_[k];
    }
  }

 private:
  static constexpr int kVecs = kHeadSize / 32;
  static constexpr int kTotal = kGroupTiles * kVecs * kWarpSize;
  static constexpr int kPerThread = (kTotal + kThreads - 1) / kThreads;

  Vec vecs_[kPerThread];
};

// For an fp8 cache neighbouring lanes load a head, so that they can tell what it is divided by: a
// vector each, so that the conversion, for which all wait, is short. The keys' scale is loaded
// beside the query, because it would be waited for by itself later.
template <int kHeadSize, int kGroupTiles, int kThreads>
class HalfGroupQueryLoad {
 public:
  __device__ void load(const __nv_bfloat16* query, int64_t head_stride, int group_size,
                       const KvScales& scales) {
    key_scale_ = load_once(scales.key);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      vecs_[k][0] = {};
      if (vec() < kHeadVecs && head(k) < group_size) {
        vecs_[k][0] = load_once(query + head(k) * head_stride +
                                Vec::kElements * vec_of<Fp8, kVecs>(vec() / 4, vec() % 4));
      }
    }
  }

  __device__ void store(HalfGroupQuery<kHeadSize, kGroupTiles>& to) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (head(k) >= kHeads) return;  // All lanes of a warp, since it has a power of two of heads.
      const float divisor = divide_to_halves<kLanes>(vecs_[k]);
      if (vec() == 0) {
        to.divisor[head(k)] = divisor;
        to.key_factor[head(k)] = divisor * key_scale_;
      }
      if (vec() < kHeadVecs) {
        to.vecs[head(k) / 8][vec() / 4][head(k) % 8 * 4 + vec() % 4] = vecs_[k][0];
      }
    }
  }

 private:
  static constexpr int kHeads = 8 * kGroupTiles;
  static constexpr int kVecs = kHeadSize / 32, kHeadVecs = kHeadSize / Vec::kElements;
  static constexpr unsigned kLanes = std::bit_ceil(unsigned{kHeadVecs});  // lanes to a head
  static constexpr int kHeadsAtOnce = kThreads / kLanes;
  static constexpr int kPerThread = (kHeads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  static_assert(kLanes <= kWarpSize && kHeads % (kWarpSize / kLanes) == 0);

  // This thread's k-th head, and its vector of each. Unsigned: cheaper to divide.
  static __device__ int head(int k) { return k * kHeadsAtOnce + threadIdx.x / kLanes; }
  static __device__ int vec() { return threadIdx.x % kLanes; }

  Vec vecs_[kPerThread][1];
  float key_scale_;
};

template <typename T, typename Stored, int kHeadSize, int kGroupTiles, int kThreads>
using GroupQueryLoad =
    std::conditional_t<kIsFp8<Stored>, HalfGroupQueryLoad<kHeadSize, kGroupTiles, kThreads>,
                       SameGroupQueryLoad<T, kHeadSize, kGroupTiles, kThreads>>;

// `Stored`: the type of the cache's elements.
template <typename Stored, int kHeadSize, int kGroupTiles>
class WarpAttention {
 public:
  using Query = GroupQuery<Stored, kHeadSize, kGroupTiles>;
  using Tile = quest::cuda::Tile<Stored, kHeadSize>;
  using Compute = typename CacheElement<Stored>::Compute;
  static constexpr int kVecs = Tile::kVecs, kSlabs = (kHeadSize + kSlab - 1) / kSlab;

  // `pitch`: bytes from group to group in the tiles.
  __device__ WarpAttention(const Query& query, int pitch, float scale, float soft_cap)
      : query_(query),
        pitch_(pitch),
        scale_(scale),
        soft_cap_(soft_cap),
        lane_(threadIdx.x % kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4) {}

  // Forget all tokens.
  __device__ void reset() {
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        max_log2_[tile][k] = -INFINITY;
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
  }

  // Attend to the first `rest` positions of a tile, at least one.
  __device__ void attend(const unsigned char* tile, int rest) {
    float logits[kGroupTiles][4];
    uint32_t weights[kGroupTiles][2];
    multiply_keys(tile, logits);
    weigh(logits, rest, weights);
    add_values(tile, weights);
  }

  // The state of query head 2c + k of a group tile, over the warp's tokens; in all lanes.
  __device__ SoftmaxState state(int tile, int k) const {
    float sum = sum_[tile][k];
#pragma unroll
    for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    return {max_log2_[tile][k], sum};
  }

  // The largest logit of query head 2c + k of a group tile.
  __device__ float max_log2(int tile, int k) const { return max_log2_[tile][k]; }

  // Writes a lane's 8 weighted values of query head 2c + k, dimensions slab * 64 + 8 * r onwards.
  __device__ void write_values(int tile, int slab, int k, float factor, float* values) const {
    float4* to = reinterpret_cast<float4*>(values);
    const float (&x)[4][4] = out_[tile][slab];
    to[0] =
        make_float4(x[0][k] * factor, x[0][k + 2] * factor, x[1][k] * factor, x[1][k + 2] * factor);
    to[1] =
        make_float4(x[2][k] * factor, x[2][k + 2] * factor, x[3][k] * factor, x[3][k + 2] * factor);
  }

 private:
  // Lane 4 * r + c gets the logits of rows r (first two) and r + 8 (last two) for query heads 2c,
  // 2c + 1.
  __device__ void multiply_keys(const unsigned char* tile_rows,
                                float (&logits)[kGroupTiles][4]) const {
    const unsigned char* row = tile_rows + Tile::offset(Tile::token_of_row(r_), pitch_);
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      float sum[2][4] = {};  // Two sums shorten the chain of products.
#pragma unroll kKeyUnroll    // Unrolled in full, head size 256 needs too many registers.
      for (int first_j = 0; first_j < kVecs; first_j += RowVecs::kAtOnce) {
        RowVecs first, second;  // rows r and r + 8
        first.load(row, first_j, c_, r_ % 2);
        second.load(row + 2 * Tile::kRowBytes, first_j, c_, r_ % 2);
#pragma unroll
        for (int k = 0; k < RowVecs::kAtOnce; ++k) {
          if (kVecs % 2 != 0 && first_j + k == kVecs) break;
          const Vec query = query_[tile][first_j + k][lane_];
          const auto &x = first.vec(k), &y = second.vec(k);
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            const MatrixA keys = {{{x.word[w], x.word[w + 1]}, {y.word[w], y.word[w + 1]}}};
            Element<Compute>::mma(sum[w / 2], keys, query.word[w], query.word[w + 1]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) logits[tile][k] = sum[0][k] + sum[1][k];
    }
  }

  // Online softmax, base 2: from logits to weights, laid out as the second product's operand.
  __device__ void weigh(float (&logits)[kGroupTiles][4], int remaining,
                        uint32_t (&weights)[kGroupTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
      float (&x)[4] = logits[tile];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (soft_cap_ > 0.0f) {
          // soft_cap * tanh(x * scale / soft_cap), by 1 - 2 / (1 + exp(2 ...)).
          const float y =
              exp2_fast(x[k] * __fdividef(scale(tile, k % 2), soft_cap_) * (2.0f * kLog2E));
          x[k] = soft_cap_ * (1.0f - __fdividef(2.0f, 1.0f + y)) * kLog2E;
        } else {
          x[k] *= scale(tile, k % 2) * kLog2E;
        }
        if (Tile::token_of_row(r_) + k / 2 * 2 >= remaining) x[k] = -INFINITY;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float maximum = fmaxf(x[k], x[k + 2]);
#pragma unroll
        for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
          maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, lanes));
        }
        maximum = fmaxf(maximum, max_log2_[tile][k]);
        const float factor = rescale(max_log2_[tile][k], maximum);
        max_log2_[tile][k] = maximum;
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
      weights[tile][0] = transpose_8x8(pack<Compute>(x[0], x[1]));
      weights[tile][1] = transpose_8x8(pack<Compute>(x[2], x[3]));
    }
  }

  // out_[tile][slab][w]: lane 4 * r + c has dimensions 64 * slab + 8 * r + 2w (first two) and the
  // next (last two) for query heads 2c, 2c + 1.
  __device__ void add_values(const unsigned char* tile_rows,
                             const uint32_t (&weights)[kGroupTiles][2]) {
    const unsigned char* rows = tile_rows + c_ * pitch_ + Tile::kRowBytes / 2;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int vec =
          slab * kSlab / Vec::kElements + r_;  // Past the head's end its values are unused.
      const bool in_head = kHeadSize % kSlab == 0 || vec * Vec::kElements < kHeadSize;
      using Packed = typename CacheElement<Stored>::Packed;
      Packed v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // rows 2c, 2c + 1, 2c + 8, 2c + 9
        v[k] = reinterpret_cast<const Packed*>(rows + k * Tile::kRowBytes)[in_head ? vec : 0];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const MatrixA values = {{{firsts(v[0], v[1], w), firsts(v[2], v[3], w)},
                                 {seconds(v[0], v[1], w), seconds(v[2], v[3], w)}}};
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
          Element<Compute>::mma(out_[tile][slab][w], values, weights[tile][0], weights[tile][1]);
        }
      }
    }
  }

  // Elements 2w of two vectors, and elements 2w + 1.
  static __device__ __forceinline__ uint32_t firsts(const Vec& x, const Vec& y, int w) {
    return pack_low(x.word[w], y.word[w]);
  }
  static __device__ __forceinline__ uint32_t seconds(const Vec& x, const Vec& y, int w) {
    return pack_high(x.word[w], y.word[w]);
  }
  static __device__ __forceinline__ uint32_t firsts(const Fp8Vec& x, const Fp8Vec& y, int w) {
    return halves_of(both(x, y, w)).low;
  }
  static __device__ __forceinline__ uint32_t seconds(const Fp8Vec& x, const Fp8Vec& y, int w) {
    return halves_of(both(x, y, w)).high;
  }
  static __device__ __forceinline__ uint32_t both(const Fp8Vec& x, const Fp8Vec& y, int w) {
    return __byte_perm(x.word[w / 2], y.word[w / 2], w % 2 == 0 ? 0x5140 : 0x7362);
  }

  // The factor of a product of keys and query head 2c + k of a group tile.
  __device__ float scale(int tile, int k) const {
    if constexpr (kIsFp8<Stored>) return scale_ * query_.key_factor[tile * 8 + 2 * c_ + k];
    return scale_;
  }

  using RowVecs = quest::cuda::RowVecs<Stored, kVecs>;
  static constexpr int kKeyUnroll = 4 / RowVecs::kAtOnce;

  const Query& query_;
  const int pitch_;
  const float scale_, soft_cap_;
  const int lane_, r_, c_;

  // The softmax states of query heads 2c, 2c + 1: the warp's maxima, the lane's sums. As
  // SoftmaxState, ptxas 13.0 assigns other registers.
  float max_log2_[kGroupTiles][2], sum_[kGroupTiles][2];
  float out_[kGroupTiles][kSlabs][4][4];
};

}  // namespace quest::cuda
