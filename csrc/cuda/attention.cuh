// What a warp does with a tile of keys and values: 16 positions of one (row, KV head), for its
// query group.
//
//     logits  [16 positions x 8 query heads]   = keys [16 x head_size] * query^T
//     out^T   [head_size x 8 query heads]     += values^T [head_size x 16] * weights
//
// Online softmax, in fp32.
#pragma once

#include "device.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace quest::cuda {

// Dimensions of the head that a warp's lanes hold at once, 8 in each lane of equal c.
constexpr int kSlab = 64;

// A query group, padded to kGroupTiles * 8 heads, in the order in which lanes read it: element
// [g][j][4 * r + c] is vector vec_of(j, c) of query head 8 * g + r.
template <int kHeadSize, int kGroupTiles>
using GroupQuery = Vec[kGroupTiles][Tile<kHeadSize>::kVecs][kWarpSize];

// All threads of a CTA load a query group, [group_size, head_size], with zeros for the heads that
// pad it. It arrives in registers, so other work can begin before it is stored in shared memory.
template <typename T, int kHeadSize, int kGroupTiles, int kThreads>
class GroupQueryLoad {
 public:
  __device__ void load(const T* query, int64_t head_stride, int group_size) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const unsigned i = threadIdx.x + k * kThreads;  // unsigned: cheaper to divide
      const unsigned lane = i % kWarpSize, j = i / kWarpSize % kVecs, tile = i / kWarpSize / kVecs;
      const int head = tile * 8 + lane / 4;
      vecs_[k] = {};
      if (i < kTotal && head < group_size) {
        vecs_[k] = load_once(query + head * head_stride + Vec::kElements * vec_of(j, lane % 4));
      }
    }
  }

  __device__ void store(GroupQuery<kHeadSize, kGroupTiles>& to) const {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i < kTotal) (&to[0][0][0])[i] = vecs_[k];
    }
  }

 private:
  static constexpr int kVecs = Tile<kHeadSize>::kVecs;
  static constexpr int kTotal = kGroupTiles * kVecs * kWarpSize;
  static constexpr int kPerThread = (kTotal + kThreads - 1) / kThreads;

  Vec vecs_[kPerThread];
};

template <typename T, int kHeadSize, int kGroupTiles>
class WarpAttention {
 public:
  using Tile = quest::cuda::Tile<kHeadSize>;
  static constexpr int kVecs = Tile::kVecs, kSlabs = (kHeadSize + kSlab - 1) / kSlab;

  // `pitch`: bytes from group to group in the tiles.
  __device__ WarpAttention(const GroupQuery<kHeadSize, kGroupTiles>& query, int pitch, float scale,
                           float soft_cap)
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
#pragma unroll 2             // Unrolled in full, head size 256 needs too many registers.
      for (int first_j = 0; first_j < kVecs; first_j += 2) {
        Vec first[2], second[2];  // rows r and r + 8
        load_two<kVecs>(row, first_j, c_, r_ % 2, first);
        load_two<kVecs>(row + 2 * Tile::kRowBytes, first_j, c_, r_ % 2, second);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (kVecs % 2 != 0 && first_j + k == kVecs) break;
          const Vec query = query_[tile][first_j + k][lane_];
          const auto &x = first[k].word, &y = second[k].word;
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            const MatrixA keys = {{{x[w], x[w + 1]}, {y[w], y[w + 1]}}};
            Element<T>::mma(sum[w / 2], keys, query.word[w], query.word[w + 1]);
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
          const float y = exp2_fast(x[k] * __fdividef(scale_, soft_cap_) * (2.0f * kLog2E));
          x[k] = soft_cap_ * (1.0f - __fdividef(2.0f, 1.0f + y)) * kLog2E;
        } else {
          x[k] *= scale_ * kLog2E;
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
      weights[tile][0] = transpose_8x8(pack<T>(x[0], x[1]));
      weights[tile][1] = transpose_8x8(pack<T>(x[2], x[3]));
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
      Vec v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // rows 2c, 2c + 1, 2c + 8, 2c + 9
        v[k] = reinterpret_cast<const Vec*>(rows + k * Tile::kRowBytes)[in_head ? vec : 0];
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

  const GroupQuery<kHeadSize, kGroupTiles>& query_;
  const int pitch_;
  const float scale_, soft_cap_;
  const int lane_, r_, c_;

  // The softmax states of query heads 2c, 2c + 1: the warp's maxima, the lane's sums. As
  // SoftmaxState, ptxas 13.0 assigns other registers.
  float max_log2_[kGroupTiles][2], sum_[kGroupTiles][2];
  float out_[kGroupTiles][kSlabs][4][4];
};

}  // namespace quest::cuda
