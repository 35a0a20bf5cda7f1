// write_codes: code the groups whose last token write_kv has just stored.
//
// A CTA takes a group's keys to shared memory, all copies in flight at once; then a thread has a
// channel, whose sums it takes in the order of the tokens, and last a word of 16 channels of a
// token at a time. In decode, 127 steps of 128 complete no group of a row, and the CTA only looks.
//
// Bytes: 256 * head_size read and 36 * head_size written per group and KV head.
#include "device.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace quest::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kShare = 1.0f / kGroupTokens;

// How slots are dealt to CTAs, and what they divide by.
struct Deal {
  int window;  // slots of a CTA, at most kThreads
  Divisor block_tokens;
};

// What a key element is coded by: its distance above the offset exceeds 0 to 3 of the levels.
struct Levels {
  float offset, low, middle, high;

  __device__ uint32_t code(float key) const {
    const float above = __fadd_rn(key, -offset);
    return (above > low) + (above > middle) + (above > high);
  }
};

// Rows of keys lie 16 bytes further apart than they are long, so that threads of neighbouring
// tokens read different banks.
template <int kHeadSize>
struct CodesMemory {
  static constexpr int kPitch = kHeadSize + Vec::kElements;  // elements
  Levels levels[kHeadSize];
  alignas(16) uint16_t keys[kGroupTokens * kPitch];
};

// All operations are those of the reference, in its order: its bits are stored.
template <typename T>
__device__ Levels write_scales(const T* keys, int pitch, T* offset_to, T* step_to) {
  float sum = 0.0f, deviations = 0.0f;
#pragma unroll 16
  for (int token = 0; token < kGroupTokens; ++token) {
    sum = __fadd_rn(sum, static_cast<float>(keys[token * pitch]));
  }
  const float mean = __fmul_rn(sum, kShare);
#pragma unroll 16
  for (int token = 0; token < kGroupTokens; ++token) {
    const float distance = __fadd_rn(static_cast<float>(keys[token * pitch]), -mean);
    deviations = __fadd_rn(deviations, fabsf(distance));
  }
  const float deviation = __fmul_rn(deviations, kShare);
  const T stored_step = Element<T>::from_float(__fadd_rn(deviation, __fmul_rn(deviation, 0.25f)));
  const float step = static_cast<float>(stored_step), half = __fmul_rn(step, 0.5f);
  const T stored_offset = Element<T>::from_float(__fadd_rn(__fadd_rn(mean, -step), -half));
  *offset_to = stored_offset;
  *step_to = stored_step;
  return {static_cast<float>(stored_offset), half, __fadd_rn(step, half),
          __fadd_rn(__fmul_rn(step, 2.0f), half)};
}

template <typename T, int kHeadSize>
__device__ void write_group(const T* keys, T* rows, CodesMemory<kHeadSize>& shared) {
  constexpr int kRowSize = 2 * kHeadSize, kRowVecs = kHeadSize / Vec::kElements;
  constexpr int kPitch = CodesMemory<kHeadSize>::kPitch;
  T* const copied = reinterpret_cast<T*>(shared.keys);

  // Copy the keys.
  constexpr int kCopies = kGroupTokens * kRowVecs / kThreads,
                kInFlight = kCopies < 16 ? kCopies : 16;
  static_assert(kGroupTokens * kRowVecs % kThreads == 0 && kCopies % kInFlight == 0);
  for (int first = 0; first < kCopies; first += kInFlight) {
    Vec vecs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = (first + k) * kThreads + threadIdx.x;
      vecs[k] = load_once(keys + i / kRowVecs * kRowSize + i % kRowVecs * Vec::kElements);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = (first + k) * kThreads + threadIdx.x;
      *reinterpret_cast<Vec*>(copied + i / kRowVecs * kPitch + i % kRowVecs * Vec::kElements) =
          vecs[k];
    }
  }
  __syncthreads();

  // Take each channel's scales.
  T* const scales = rows + kScalesRow * kRowSize;
  for (int d = threadIdx.x; d < kHeadSize; d += kThreads) {
    shared.levels[d] = write_scales(copied + d, kPitch, scales + d, scales + kHeadSize + d);
  }
  __syncthreads();

  // Make the words: a warp has neighbouring tokens, and the same channels in all lanes.
  uint32_t* const words = reinterpret_cast<uint32_t*>(rows);
  for (int i = threadIdx.x; i < kHeadSize / kWordChannels * kGroupTokens; i += kThreads) {
    const int first = i / kGroupTokens * kWordChannels, token = i % kGroupTokens;
    Vec vecs[2];
    vecs[0] = *reinterpret_cast<const Vec*>(copied + token * kPitch + first);
    vecs[1] = *reinterpret_cast<const Vec*>(copied + token * kPitch + first + Vec::kElements);
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < kWordChannels; ++k) {
      const float key = static_cast<float>(reinterpret_cast<const T*>(vecs)[k]);
      word |= shared.levels[first + k].code(key) << (8 * (k % 4) + 2 * (k / 4));
    }
    words[i] = word;
  }
  __syncthreads();  // before the next group's keys
}

template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads)
    write_codes_kernel(const __grid_constant__ WriteKvParams p, const __grid_constant__ Deal deal) {
  // grid: [windows, heads]; a CTA codes the groups that end in its window of slots.
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<CodesMemory<kHeadSize>*>(shared_memory);
  __shared__ int ends[kThreads];  // tokens of the cache, of those slots that end a group
  __shared__ int num_ends;

  // Find the slots that end a group.
  if (threadIdx.x == 0) num_ends = 0;
  __syncthreads();
  const int slot = static_cast<int>(blockIdx.x) * deal.window + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < deal.window && slot < p.num_slots) {
    const int token = static_cast<int>(p.slot_mapping[slot]);
    if (token >= 0 && token % kGroupTokens == kGroupTokens - 1) {
      ends[atomicAdd(&num_ends, 1)] = token;
    }
  }
  __syncthreads();
  wait_for_previous_kernel();
  release_next_kernel();

  for (int i = 0; i < num_ends; ++i) {
    const int block = deal.block_tokens.quotient(ends[i]);
    const int group = (ends[i] - block * p.cache.block_tokens) / kGroupTokens;
    T* rows = static_cast<T*>(p.cache.data) + block * p.cache.block_stride +
              blockIdx.y * p.cache.head_stride;
    write_group<T, kHeadSize>(rows + group * kGroupTokens * 2 * kHeadSize,
                              rows + (p.cache.block_tokens + group * kGroupRows) * 2 * kHeadSize,
                              shared);
  }
}

template <typename T, int kHeadSize>
cudaError_t launch_write_codes(const WriteKvParams& params, cudaStream_t stream) {
  const auto kernel = write_codes_kernel<T, kHeadSize>;
  constexpr int kBytes = sizeof(CodesMemory<kHeadSize>);
  static const bool fits = shared_memory_for(kernel, 1) >= kBytes;
  if (!fits) return cudaErrorInvalidConfiguration;
  // Windows are as short as lets all CTAs run at once: in decode a slot each.
  const int heads = params.cache.num_kv_heads;
  int window = 1;
  while (window < kThreads &&
         int64_t{div_up(params.num_slots, window)} * heads > num_multiprocessors()) {
    window *= 2;
  }
  return launch(kernel, dim3(div_up(params.num_slots, window), heads), kThreads, kBytes, stream,
                params, Deal{window, Divisor(params.cache.block_tokens)});
}

}  // namespace

cudaError_t write_codes(const WriteKvParams& params, cudaStream_t stream) {
  return for_shape(params.cache, 1, [&](auto shape) {
    using S = decltype(shape);
    return launch_write_codes<typename S::Type, S::kHeadSize>(params, stream);
  });
}

}  // namespace quest::cuda
