// write_kv: store keys and values in their slots, and recompute the bounds of the touched pages.
//
// A token is an index in the batch, a slot is a place in the cache, and a page is a page of the
// cache. Tokens of one page are adjacent in the batch: a run. A warp has a window of tokens and a
// KV head, and writes the runs that end in its window. Each lane owns columns of 16 bytes of the
// cache's rows. It copies them, and keeps the minimum and maximum of its keys' columns. Then it
// reads the page's earlier keys, which no other warp of this launch writes.
//
// The bounds of the other scores (score_kind.h) read the page's keys once or twice more, from L2.
//
// An fp8 cache gets bounds of its own elements, so the keys that it stores do not exceed them.
//
// Bytes: 4 * head_size read and written, or 2 * head_size written in fp8, per token and KV head. A
// page that was begun in an earlier step adds its earlier keys. Each page adds its bounds. Decode
// waits for memory twice: for slots, and for keys and values. See DESIGN.md, "write_kv".
#include "device.cuh"
#include "divisor.cuh"
#include "fp8.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace quest::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kCtasPerMultiprocessor = 2;  // Each thread then has up to 128 registers.
// A lane loads 8 rows of the batch before it stores the first, and 16 rows of the cache at once.
constexpr int kBatchRowsInFlight = 8;
constexpr int kCacheRowsInFlight = 16;
constexpr int kMaxWindowTokens = 16;

// How the tokens of a batch are dealt to warps, and the numbers that warps divide by.
struct Partition {
  int window_tokens;
  Divisor window_stride;  // windows from a warp's to that of the CTA's next warp
  Divisor page_size, pages_per_block;
};

// The minimum and maximum of 8 columns; NaN wins. `T`: what the cache's elements are computed with.
template <typename T>
struct Extremes {
  Vec low = all(Element<T>::kInfinity), high = all(Element<T>::kMinusInfinity);

  __device__ void add(const Vec& row) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      low.word[w] = min_pair<T>(low.word[w], row.word[w]);
      high.word[w] = max_pair<T>(high.word[w], row.word[w]);
    }
  }

 private:
  __device__ static Vec all(uint32_t pair) { return {{pair, pair, pair, pair}}; }
};

// 8 columns in fp32.
struct Floats {
  float at[Vec::kElements];

  template <typename T>
  __device__ static Floats of(const Vec& row) {
    Floats result;
#pragma unroll
    for (int i = 0; i < Vec::kElements; ++i) {
      result.at[i] = static_cast<float>(reinterpret_cast<const T*>(&row)[i]);
    }
    return result;
  }

  template <typename T>
  __device__ Vec rounded() const {
    Vec row;
#pragma unroll
    for (int w = 0; w < 4; ++w) row.word[w] = pack<T>(at[2 * w], at[2 * w + 1]);
    return row;
  }
};

// Makes elements of the cache from 8 elements of the batch. `T`: their type.
template <typename T, typename Stored>
class Quantiser {
 public:
  struct Scales {};

  __device__ static Scales load(const KvScales&) { return {}; }
  __device__ Quantiser(const Scales&, bool) {}
  __device__ const Vec& operator()(const Vec& elements) const { return elements; }
};

// The bits of vLLM's own write: x / scale, rounded to fp32, then to fp8. A division would take ten
// instructions and a branch for each x. Here x is multiplied by the scale's reciprocal, and the
// product is corrected by what it leaves of x. With the reciprocal rounded to the nearest this is
// the quotient rounded to the nearest for every mantissa of x and of the scale (all 2^30 were
// tried). Quotients out of its range are those that fp8 does not tell from 0 or from the largest.
// Scales are finite and above 0.
template <typename T>
class Quantiser<T, Fp8> {
 public:
  struct Scales {
    float key, value;
  };

  // Called as early as scales may be read: what is computed from them does not wait then.
  __device__ static Scales load(const KvScales& from) {
    return {load_once(from.key), load_once(from.value)};
  }

  // The scale is brought to where its reciprocal and the remainders are normal numbers.
  __device__ Quantiser(const Scales& scales, bool is_key) {
    const float scale = is_key ? scales.key : scales.value;
    factor_ = scale < 0x1p-64f ? 0x1p64f : scale > 0x1p64f ? 0x1p-64f : 1.0f;
    divisor_ = scale * factor_;
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(divisor_));
    reciprocal_ = fmaf(fmaf(-divisor_, estimate, 1.0f), estimate, estimate);
  }

  __device__ Fp8Vec operator()(const Vec& elements) const {
    const Floats x = Floats::of<T>(elements);
    Fp8Vec result;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float* const four = x.at + 4 * w;
      result.word[w] = fp8_of(quotient(four[0]), quotient(four[1])) |
                       fp8_of(quotient(four[2]), quotient(four[3])) << 16;
    }
    return result;
  }

 private:
  __device__ float quotient(float x) const {
    x *= factor_;
    const float q = x * reciprocal_;
    // With these signs -0 stays -0.
    const float corrected = fmaf(fmaf(divisor_, q, -x), -reciprocal_, q);
    return fabsf(q) < kSaturated ? corrected : q;  // Infinity leaves no remainder.
  }

  static constexpr float kSaturated = 1024.0f;  // Any quotient from here on becomes the largest.

  float factor_, divisor_, reciprocal_;
};

// The slot of a token, counted over all blocks. Negative for padding and outside the batch.
__device__ __forceinline__ int slot_of(const WriteKvParams& p, int token) {
  return token >= 0 && token < p.num_slots ? static_cast<int>(p.slot_mapping[token]) : -1;
}

// Adjacent tokens, one to a lane.
struct LaneTokens {
  int first_token;  // lane 0's
  int slot;         // this lane's

  __device__ LaneTokens(const WriteKvParams& p, int first_token)
      : first_token(first_token),
        slot(slot_of(p, first_token + static_cast<int>(threadIdx.x) % kWarpSize)) {}
};

// `T`: the type of keys and values. `Stored`: that of the cache's elements.
template <typename T, typename Stored, ScoreKind kScore>
class RunWriter {
 public:
  using Quantiser = quest::cuda::Quantiser<T, Stored>;

  // The run ends with the token of lane `last_lane`.
  __device__ RunWriter(const WriteKvParams& p, const Quantiser::Scales& scales,
                       const Partition& partition, const LaneTokens& tokens, int last_lane,
                       int head)
      : p_(p), scales_(scales), head_(head) {
    const int slot = __shfl_sync(kAllLanes, tokens.slot, last_lane);
    const int page_size = p.cache.page_size;
    const int page = partition.page_size.quotient(slot);
    page_slot_ = page * page_size;
    last_offset_ = slot - page_slot_;
    const int block = partition.pages_per_block.quotient(page);
    const int page_in_block = page - block * p.cache.pages_per_block;
    Stored* rows = static_cast<Stored*>(p.cache.data) + block * p.cache.block_stride +
                   head * p.cache.head_stride;
    page_rows_ = rows + page_in_block * page_size * row_size();
    bounds_ = rows + (p.cache.block_tokens + page_in_block) * row_size();
    find_first(tokens, last_lane);
  }

  __device__ void run() {
    const bool skips_slots = last_offset_ - first_offset_ + 1 != num_tokens_;
    const int lane = threadIdx.x % kWarpSize;
    for (int column = Vec::kElements * lane; column < row_size();
         column += Vec::kElements * kWarpSize) {
      const bool is_key = column < p_.cache.head_size;
      const Source from =
          is_key ? Source{static_cast<const T*>(p_.key) + head_ * p_.key_head_stride +
                              first_token_ * p_.key_token_stride + column,
                          p_.key_token_stride}
                 : Source{static_cast<const T*>(p_.value) + head_ * p_.value_head_stride +
                              first_token_ * p_.value_token_stride + column - p_.cache.head_size,
                          p_.value_token_stride};
      const Extremes<Compute> extremes =
          skips_slots ? copy_each(from, column) : copy(from, is_key, page_rows_ + column);
      if (kHasBounds && is_key) store_bounds(extremes, column);
    }
  }

 private:
  using Cache = CacheElement<Stored>;
  using Compute = typename Cache::Compute;
  static constexpr bool kHasBounds = kScore != ScoreKind::kCodes;  // else write_codes comes next

  // A lane's columns of the run's keys or values in the batch.
  struct Source {
    const T* first;
    int64_t token_stride;
  };

  __device__ int row_size() const { return 2 * p_.cache.head_size; }

  // Find the run's first token.
  __device__ void find_first(LaneTokens tokens, int last_lane) {
    num_tokens_ = count_in_page(tokens, last_lane);
    first_token_ = tokens.first_token + last_lane + 1 - num_tokens_;
    first_offset_ = __shfl_sync(kAllLanes, tokens.slot, last_lane + 1 - num_tokens_) - page_slot_;
    // The page may have more tokens than there are lanes.
    for (int found = num_tokens_; found == last_lane + 1;) {
      last_lane = kWarpSize - 1;
      tokens = LaneTokens(p_, tokens.first_token - kWarpSize);
      found = count_in_page(tokens, last_lane);
      if (found == 0) break;
      num_tokens_ += found;
      first_token_ -= found;
      first_offset_ = __shfl_sync(kAllLanes, tokens.slot, last_lane + 1 - found) - page_slot_;
    }
  }

  // Count the adjacent lanes, from `last_lane` down, whose slots lie in the page.
  __device__ int count_in_page(const LaneTokens& tokens, int last_lane) const {
    const bool in_page =
        static_cast<unsigned>(tokens.slot - page_slot_) < static_cast<unsigned>(p_.cache.page_size);
    return __clz(~(__ballot_sync(kAllLanes, in_page) << (kWarpSize - 1 - last_lane)));
  }

  // Copy a run that skips no slot to the page's rows. Returns the extremes of its columns and of
  // the page's earlier keys.
  __device__ Extremes<Compute> copy(const Source& from, bool is_key, Stored* rows) const {
    Extremes<Compute> extremes;
    for (int i = 0; i < num_tokens_; i += kBatchRowsInFlight) {
      Vec added[kBatchRowsInFlight];
#pragma unroll
      for (int k = 0; k < kBatchRowsInFlight; ++k) {
        if (k < num_tokens_ - i) added[k] = load_once(from.first + (i + k) * from.token_stride);
      }
      if (kHasBounds && i == 0 && is_key) read_stored(rows, extremes);
      const Quantiser quantise(scales_, is_key);
#pragma unroll
      for (int k = 0; k < kBatchRowsInFlight; ++k) {
        if (k < num_tokens_ - i) {
          const auto stored = quantise(added[k]);
          store(rows + (first_offset_ + i + k) * row_size(), stored);
          extremes.add(Cache::unpacked(stored));
        }
      }
    }
    return extremes;
  }

  // Add the page's keys before the run.
  __device__ void read_stored(const Stored* rows, Extremes<Compute>& extremes) const {
    for (int i = 0; i < first_offset_; i += kCacheRowsInFlight) {
      typename Cache::Packed stored[kCacheRowsInFlight];
#pragma unroll
      for (int k = 0; k < kCacheRowsInFlight; ++k) {
        stored[k] = Cache::load(rows + min(i + k, first_offset_ - 1) * row_size());
      }
#pragma unroll
      for (int k = 0; k < kCacheRowsInFlight; ++k) extremes.add(Cache::unpacked(stored[k]));
    }
  }

  // Copy a run that skips slots of its page, which is rare: one token after the other.
  __device__ Extremes<Compute> copy_each(const Source& from, int column) const {
    const Quantiser quantise(scales_, column < p_.cache.head_size);
    for (int i = 0; i < num_tokens_; ++i) {
      const int offset = slot_of(p_, first_token_ + i) - page_slot_;
      store(page_rows_ + offset * row_size() + column,
            quantise(load_once(from.first + i * from.token_stride)));
    }
    Extremes<Compute> extremes;
    for (int i = 0; kHasBounds && i <= last_offset_; ++i) {
      extremes.add(Cache::unpacked(Cache::load(page_rows_ + i * row_size() + column)));
    }
    return extremes;
  }

  __device__ void store_bounds(Extremes<Compute> extremes, int column) const {
    if constexpr (kHasBounds && kScore != ScoreKind::kMinMax) {
      estimate(page_rows_ + column, extremes);
    }
    store(bounds_ + column, Cache::packed(extremes.low));
    store(bounds_ + p_.cache.head_size + column, Cache::packed(extremes.high));
  }

  // Turn the extremes of a page's keys into center - spread and center + spread.
  __device__ void estimate(const Stored* keys, Extremes<Compute>& extremes) const {
    const float inverse_count = 1.0f / static_cast<float>(last_offset_ + 1);
    Floats center{}, spread{};
    if constexpr (kScore == ScoreKind::kMeanStd) {
      for_each_key(keys, [&](int i, float key) { center.at[i] += key; });
#pragma unroll
      for (float& sum : center.at) sum *= inverse_count;
      for_each_key(keys, [&](int i, float key) {
        spread.at[i] += (key - center.at[i]) * (key - center.at[i]);
      });
#pragma unroll
      for (float& squares : spread.at) squares = sqrtf(squares * inverse_count);
    } else {
      static_assert(kScore == ScoreKind::kMidDev);
      const Floats low = Floats::of<Compute>(extremes.low),
                   high = Floats::of<Compute>(extremes.high);
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) center.at[i] = 0.5f * low.at[i] + 0.5f * high.at[i];
      for_each_key(keys, [&](int i, float key) { spread.at[i] += fabsf(key - center.at[i]); });
#pragma unroll
      for (float& sum : spread.at) sum *= inverse_count;
    }
    Floats low, high;
#pragma unroll
    for (int i = 0; i < Vec::kElements; ++i) {
      low.at[i] = center.at[i] - spread.at[i];
      high.at[i] = center.at[i] + spread.at[i];
    }
    extremes.low = low.rounded<Compute>();
    extremes.high = high.rounded<Compute>();
  }

  // Call f(column, key) for the page's keys up to the last one written.
  template <typename F>
  __device__ void for_each_key(const Stored* keys, const F& f) const {
    for (int offset = 0; offset <= last_offset_; ++offset) {
      const Floats key =
          Floats::of<Compute>(Cache::unpacked(Cache::load(keys + offset * row_size())));
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) f(i, key.at[i]);
    }
  }

  const WriteKvParams& p_;
  const Quantiser::Scales& scales_;
  const int head_;
  int page_slot_;                   // the page's first slot
  int first_offset_, last_offset_;  // the run's slots, counted from the page's first
  int first_token_, num_tokens_;    // the run's tokens
  Stored* page_rows_;               // [page_size, 2 * head_size] the head's keys and values
  Stored* bounds_;                  // [2 * head_size] the head's bounds of the page
};

template <typename T, typename Stored, ScoreKind kScore>
__global__ void __launch_bounds__(kThreads, kCtasPerMultiprocessor)
    write_kv_kernel(const __grid_constant__ WriteKvParams p,
                    const __grid_constant__ Partition partition,
                    const __grid_constant__ KvScales scales) {
  // grid: [windows / kWarps, KV heads]; a warp writes the runs that end in its window.
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  // In prefill one window in several holds the end of a run. Each warp rotates its windows by one
  // more than the warp before it, so that windows with ends fall to different CTAs.
  const int stride = partition.window_stride.divisor(), rotated_cta = blockIdx.x + warp;
  const int window =
      warp * stride + rotated_cta - partition.window_stride.quotient(rotated_cta) * stride;

  // Find the ends of runs: tokens followed by another page, by padding, or by nothing. The last
  // lanes hold the window. The other lanes hold the tokens before it, where runs may have begun.
  const LaneTokens tokens(p, (window + 1) * partition.window_tokens - kWarpSize);
  const int next_slot = slot_of(p, tokens.first_token + lane + 1);
  const bool is_end = lane >= kWarpSize - partition.window_tokens && tokens.slot >= 0 &&
                      (next_slot < 0 || partition.page_size.quotient(next_slot) !=
                                            partition.page_size.quotient(tokens.slot));
  unsigned ends = __ballot_sync(kAllLanes, is_end);
  wait_for_previous_kernel();
  release_next_kernel();

  if (ends == 0) return;
  using Writer = RunWriter<T, Stored, kScore>;
  const auto loaded_scales = Writer::Quantiser::load(scales);
  for (; ends != 0; ends &= ends - 1) {
    Writer(p, loaded_scales, partition, tokens, __ffs(ends) - 1, blockIdx.y).run();
  }
}

using Kernel = void (*)(WriteKvParams, Partition, KvScales);

// The kernel, for multiprocessors whose memory is shared memory and not L1, as cluster_decode needs
// it: their CTAs run beside each other.
template <typename T, typename Stored, ScoreKind kScore>
Kernel kernel_of() {
  constexpr Kernel kernel = write_kv_kernel<T, Stored, kScore>;
  static const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  return error == cudaSuccess ? kernel : nullptr;
}

template <typename T, typename Stored>
Kernel kernel_for(ScoreKind score) {
  switch (score) {
    case ScoreKind::kMinMax:
      return kernel_of<T, Stored, ScoreKind::kMinMax>();
    case ScoreKind::kMeanStd:
      return kernel_of<T, Stored, ScoreKind::kMeanStd>();
    case ScoreKind::kMidDev:
      return kernel_of<T, Stored, ScoreKind::kMidDev>();
    case ScoreKind::kCodes:
      if constexpr (!kIsFp8<Stored>) return kernel_of<T, Stored, ScoreKind::kCodes>();
  }
  return nullptr;
}

Kernel kernel_for(DType dtype, ScoreKind score) {
  switch (dtype) {
    case DType::kBFloat16:
      return kernel_for<__nv_bfloat16, __nv_bfloat16>(score);
    case DType::kFloat16:
      return kernel_for<__half, __half>(score);
    case DType::kFloat8:
      return kernel_for<__nv_bfloat16, Fp8>(score);
    case DType::kFloat32:
      break;
  }
  return nullptr;
}

}  // namespace

cudaError_t write_kv(const WriteKvParams& params, const KvScales& scales, cudaStream_t stream) {
  // Take the shortest windows with which all CTAs run at once: in decode one token each.
  const int heads = params.cache.num_kv_heads;
  const int max_ctas = num_multiprocessors() * kCtasPerMultiprocessor;
  const auto ctas_per_head = [&](int window_tokens) {
    return div_up(div_up(params.num_slots, window_tokens), kWarps);
  };
  int window_tokens = 1;
  while (window_tokens < kMaxWindowTokens && ctas_per_head(window_tokens) * heads > max_ctas) {
    window_tokens *= 2;
  }
  const int stride = ctas_per_head(window_tokens);
  const Partition partition = {window_tokens, Divisor(stride), Divisor(params.cache.page_size),
                               Divisor(params.cache.pages_per_block)};
  const Kernel kernel = kernel_for(params.cache.dtype, params.score);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch(kernel, dim3(stride, heads), kThreads, 0, stream, params, partition, scales);
}

}  // namespace quest::cuda
