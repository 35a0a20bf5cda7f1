// cluster_decode: merges the results of a CTA's warps, then those of the cluster's CTAs. Each CTA
// merges its share of the elements [group_size, head_size].
#pragma once

#include "../attention.cuh"
#include "../cluster.cuh"
#include "../divisor.cuh"
#include "../softmax.cuh"
#include "layout.cuh"

namespace quest::cuda {

template <typename T, int kHeadSize, int kGroupTiles>
class ClusterMerge {
 public:
  using Layout = ClusterLayout<kHeadSize, kGroupTiles>;
  using Memory = typename Layout::Memory;
  using Messages = typename Layout::Messages;
  using Attention = WarpAttention<T, kHeadSize, kGroupTiles>;
  static constexpr int kWarps = Layout::kWarps, kThreads = Layout::kThreads;
  static constexpr int kTileBytes = Layout::kTileBytes, kResultPitch = Layout::kResultPitch;
  static constexpr int kSlabs = (kHeadSize + kSlab - 1) / kSlab;

  __device__ ClusterMerge(const SparseDecodeParams& p, const Divisor& share, const ClusterCta& cta,
                          Memory& memory, float* merged, unsigned char* tiles, Messages* messages,
                          int row, int head)
      : p_(p),
        share_(share),
        cta_(cta),
        memory_(memory),
        merged_(merged),
        tiles_(tiles),
        messages_(messages),
        row_(row),
        head_(head),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4) {}

  // Bytes that all CTAs of the cluster, this one included, send to this one.
  __device__ int expected_bytes() const {
    const int first = first_merged(), end = first + num_merged();
    const int num_heads = (end + kHeadSize - 1) / kHeadSize - first / kHeadSize;
    return first == end
               ? 0
               : cta_.ctas * (num_merged() * sizeof(float) + num_heads * sizeof(SoftmaxState));
  }

  // Merge the warps' results, and send each CTA its share of the elements. `values` is this warp's
  // tile for its result. All maxima come first, then the sums: merging state by state would wait at
  // each step.
  __device__ void merge_warps(const Attention& attention, float* values) const {
#pragma unroll
    for (int tile = 0; tile < kGroupTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int head = tile * 8 + 2 * c_ + k;
        const SoftmaxState state = attention.state(tile, k);
        if (r_ == 0) memory_.warp_state[warp_][head] = state;
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const int dim = slab * kSlab + 8 * r_;
          if (head < p_.group_size && dim < kHeadSize) {
            attention.write_values(tile, slab, k, 1.0f, values + head * kResultPitch + dim);
          }
        }
      }
    }
    __syncthreads();

    // Merge two elements in each thread.
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < p_.group_size * kHeadSize; i += 2 * kThreads) {
      const int head = i / kHeadSize, dim = i % kHeadSize;
      SoftmaxState state[kWarps];
      float2 part[kWarps];
      SoftmaxState merged_state = no_tokens();
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        state[warp] = memory_.warp_state[warp][head];
        part[warp] = *reinterpret_cast<const float2*>(tiles_ + warp * kTileBytes +
                                                      (head * kResultPitch + dim) * sizeof(float));
        merged_state.max_log2 = fmaxf(merged_state.max_log2, state[warp].max_log2);
      }
      float2 merged = {};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float factor = rescale(state[warp].max_log2, merged_state.max_log2);
        merged_state.sum += state[warp].sum * factor;
        merged.x += part[warp].x * factor;
        merged.y += part[warp].y * factor;
      }
      const int cta = share_.quotient(i), element = i - cta * share();
      cta_.tell(cta, merged_ + first_merged() + element, memory_.arrived.parts,
                make_uint2(__float_as_uint(merged.x), __float_as_uint(merged.y)));
      // Send the head's state with its first elements in the share.
      if (dim == 0 || element == 0) {
        cta_.tell(
            cta, &messages_[cta_.rank].state[head], memory_.arrived.parts,
            make_uint2(__float_as_uint(merged_state.max_log2), __float_as_uint(merged_state.sum)));
      }
    }
  }

  // Merge all CTAs' parts of this CTA's share, and write the output. 1, 2 or 4 neighbouring lanes
  // have an element together, with up to 4 CTAs' parts each.
  __device__ void merge_ctas() const {
    constexpr int kParts = 4;
    const int log2_lanes = cta_.ctas <= kParts ? 0 : cta_.ctas <= 2 * kParts ? 1 : 2;
    static_assert(kMaxClusterCtas == 4 * kParts);
    const int lane = lane_ & ((1 << log2_lanes) - 1);
#pragma unroll 1
    for (int first = 0; first < num_merged(); first += kThreads >> log2_lanes) {
      const int i = first + (static_cast<int>(threadIdx.x) >> log2_lanes);
      const int in_share = min(i, num_merged() - 1), element = first_merged() + in_share;
      const int head = element / kHeadSize;
      SoftmaxState state[kParts];
      float part[kParts];
      SoftmaxState merged_state = no_tokens();
      float merged = 0.0f;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const int cta = min(lane + (k << log2_lanes), cta_.ctas - 1);
        state[k] = messages_[cta].state[head];
        part[k] = merged_[cta * share() + in_share];
        if (lane + (k << log2_lanes) >= cta_.ctas) state[k].max_log2 = -INFINITY;
        merged_state.max_log2 = fmaxf(merged_state.max_log2, state[k].max_log2);
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        merged_state.max_log2 =
            fmaxf(merged_state.max_log2, __shfl_xor_sync(kAllLanes, merged_state.max_log2, lanes));
      }
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const float factor = rescale(state[k].max_log2, merged_state.max_log2);
        merged_state.sum += state[k].sum * factor;
        merged += part[k] * factor;
      }
#pragma unroll 1
      for (int lanes = 1; lanes < 1 << log2_lanes; lanes *= 2) {
        merged_state.sum += __shfl_xor_sync(kAllLanes, merged_state.sum, lanes);
        merged += __shfl_xor_sync(kAllLanes, merged, lanes);
      }
      if (lane != 0 || i >= num_merged()) continue;
      T* const out = static_cast<T*>(p_.out) + row_ * p_.out_row_stride +
                     (head_ * p_.group_size + head) * p_.out_head_stride + element % kHeadSize;
      // A row without tokens has the output 0.
      *out = Element<T>::from_float(
          merged_state.sum == 0.0f ? 0.0f : __fdividef(merged, merged_state.sum));
    }
  }

 private:
  // This CTA's share of the elements [group_size, head_size]. The last CTAs' shares may be smaller.
  __device__ int share() const { return share_.divisor(); }
  __device__ int first_merged() const { return cta_.rank * share(); }
  __device__ int num_merged() const {
    return max(0, min(share(), p_.group_size * kHeadSize - first_merged()));
  }

  const SparseDecodeParams& p_;
  const Divisor& share_;
  const ClusterCta cta_;
  Memory& memory_;
  float* const merged_;         // [ctas, share] parts that all CTAs send to this one
  unsigned char* const tiles_;  // [stages, kWarps] tiles
  Messages* const messages_;    // [ctas] from each CTA
  const int row_, head_;
  const int lane_, warp_, r_, c_;
};

}  // namespace quest::cuda
