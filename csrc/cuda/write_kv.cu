// write_kv: store keys and values in their slots, and take the touched pages' bounds anew.
//
// The slots of a page are adjacent in the slot mapping: a run. A warp has a window of slots and a
// head: it handles the runs that end there. Each lane owns columns of 16 bytes of the cache's rows,
// copies them, and keeps the minimum and maximum of those that are keys; then it looks at the
// page's earlier keys, which no other warp of this launch writes.
//
// The other scores' bounds (score_kind.h) need the page's keys once or twice more, from L2.
//
// Bytes: 4 * head_size read and written per token and KV head; for a page not begun here also the
// keys before, and its bounds. Decode waits for memory twice: for slots, and for keys and values.
#include "device.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace quest::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kNewInFlight = 8;  // rows of the batch that a lane loads before it stores the first
constexpr int kStoredInFlight = 16;  // rows of the cache that it loads at once
constexpr int kResident = 2;         // CTAs of a multiprocessor: their threads have 128 registers
constexpr int kMaxWindow = 16;       // slots

// How slots are dealt to warps, and what they divide by.
struct Deal {
  int window;      // slots of a warp
  Divisor stride;  // windows from one to that of the CTA's next warp
  Divisor page_size, pages_per_block;
};

// The minimum and maximum of 8 columns; NaN wins.
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

// Where a slot's token is in the cache, counted over all blocks; negative for padding, and where
// there is no such slot.
__device__ __forceinline__ int token_of(const WriteKvParams& p, int slot) {
  return slot >= 0 && slot < p.num_slots ? static_cast<int>(p.slot_mapping[slot]) : -1;
}

// Adjacent slots, one to a lane.
struct Slots {
  int first;  // lane 0's
  int token;  // this lane's

  __device__ Slots(const WriteKvParams& p, int first)
      : first(first), token(token_of(p, first + static_cast<int>(threadIdx.x) % kWarpSize)) {}
};

template <typename T, ScoreKind kScore>
class RunWriter {
 public:
  // For the run whose last slot is that of lane `end`.
  __device__ RunWriter(const WriteKvParams& p, const Deal& deal, const Slots& slots, int end,
                       int head)
      : p_(p), head_(head) {
    const int token = __shfl_sync(kAllLanes, slots.token, end), page_size = p.cache.page_size;
    const int page = deal.page_size.quotient(token);
    begin_ = page * page_size;
    last_ = token - begin_;
    const int block = deal.pages_per_block.quotient(page);
    const int page_in_block = page - block * p.cache.pages_per_block;
    T* rows =
        static_cast<T*>(p.cache.data) + block * p.cache.block_stride + head * p.cache.head_stride;
    page_rows_ = rows + page_in_block * page_size * row_size();
    bounds_ = rows + (p.cache.block_tokens + page_in_block) * row_size();
    find_first(slots, end);
  }

  __device__ void run() {
    const bool skips_tokens = last_ - first_ + 1 != count_;
    const int lane = threadIdx.x % kWarpSize;
    for (int column = Vec::kElements * lane; column < row_size();
         column += Vec::kElements * kWarpSize) {
      const bool is_key = column < p_.cache.head_size;
      const New from =
          is_key ? New{static_cast<const T*>(p_.key) + head_ * p_.key_head_stride +
                           first_slot_ * p_.key_token_stride + column,
                       p_.key_token_stride}
                 : New{static_cast<const T*>(p_.value) + head_ * p_.value_head_stride +
                           first_slot_ * p_.value_token_stride + column - p_.cache.head_size,
                       p_.value_token_stride};
      const Extremes<T> extremes =
          skips_tokens ? copy_each(from, column) : copy(from, is_key, page_rows_ + column);
      if (kHasBounds && is_key) store_bounds(extremes, column);
    }
  }

 private:
  static constexpr bool kHasBounds = kScore != ScoreKind::kCodes;  // else write_codes comes next

  // A lane's columns of the run's new keys or values.
  struct New {
    const T* first;
    int64_t token_stride;
  };

  __device__ int row_size() const { return 2 * p_.cache.head_size; }

  // How many slots up to the last lie in its page, and where they begin.
  __device__ void find_first(Slots slots, int end) {
    count_ = count_in_page(slots, end);
    first_slot_ = slots.first + end + 1 - count_;
    first_ = __shfl_sync(kAllLanes, slots.token, end + 1 - count_) - begin_;
    // The page may have more tokens than there are lanes.
    for (int found = count_; found == end + 1;) {
      end = kWarpSize - 1;
      slots = Slots(p_, slots.first - kWarpSize);
      found = count_in_page(slots, end);
      if (found == 0) break;
      count_ += found;
      first_slot_ -= found;
      first_ = __shfl_sync(kAllLanes, slots.token, end + 1 - found) - begin_;
    }
  }

  // Of the lanes up to `end`, how many adjacent ones have slots of the page.
  __device__ int count_in_page(const Slots& slots, int end) const {
    const bool in_page =
        static_cast<unsigned>(slots.token - begin_) < static_cast<unsigned>(p_.cache.page_size);
    return __clz(~(__ballot_sync(kAllLanes, in_page) << (kWarpSize - 1 - end)));
  }

  // Copy the run, which skips no token, to the page's rows; the extremes of its columns, with those
  // of the keys before.
  __device__ Extremes<T> copy(const New& from, bool is_key, T* rows) const {
    Extremes<T> extremes;
    for (int i = 0; i < count_; i += kNewInFlight) {
      Vec added[kNewInFlight];
#pragma unroll
      for (int k = 0; k < kNewInFlight; ++k) {
        if (k < count_ - i) added[k] = load_once(from.first + (i + k) * from.token_stride);
      }
      if (kHasBounds && i == 0 && is_key) read_stored(rows, extremes);
#pragma unroll
      for (int k = 0; k < kNewInFlight; ++k) {
        if (k < count_ - i) {
          store(rows + (first_ + i + k) * row_size(), added[k]);
          extremes.add(added[k]);
        }
      }
    }
    return extremes;
  }

  // The keys before the run.
  __device__ void read_stored(const T* rows, Extremes<T>& extremes) const {
    for (int i = 0; i < first_; i += kStoredInFlight) {
      Vec stored[kStoredInFlight];
#pragma unroll
      for (int k = 0; k < kStoredInFlight; ++k) {
        stored[k] = load_once(rows + min(i + k, first_ - 1) * row_size());
      }
#pragma unroll
      for (int k = 0; k < kStoredInFlight; ++k) extremes.add(stored[k]);
    }
  }

  // Copy a run that skips tokens of its page, which is rare: one token after the other.
  __device__ Extremes<T> copy_each(const New& from, int column) const {
    for (int i = 0; i < count_; ++i) {
      const int offset = token_of(p_, first_slot_ + i) - begin_;
      store(page_rows_ + offset * row_size() + column,
            load_once(from.first + i * from.token_stride));
    }
    Extremes<T> extremes;
    for (int i = 0; kHasBounds && i <= last_; ++i) {
      extremes.add(load_once(page_rows_ + i * row_size() + column));
    }
    return extremes;
  }

  __device__ void store_bounds(Extremes<T> extremes, int column) const {
    if constexpr (kHasBounds && kScore != ScoreKind::kMinMax) {
      estimate(page_rows_ + column, extremes);
    }
    store(bounds_ + column, extremes.low);
    store(bounds_ + p_.cache.head_size + column, extremes.high);
  }

  // Turn the extremes of a page's keys into center - spread and center + spread.
  __device__ void estimate(const T* keys, Extremes<T>& extremes) const {
    const float share = 1.0f / static_cast<float>(last_ + 1);
    Floats center{}, spread{};
    if constexpr (kScore == ScoreKind::kMeanStd) {
      for_each_key(keys, [&](int i, float key) { center.at[i] += key; });
#pragma unroll
      for (float& sum : center.at) sum *= share;
      for_each_key(keys, [&](int i, float key) {
        spread.at[i] += (key - center.at[i]) * (key - center.at[i]);
      });
#pragma unroll
      for (float& squares : spread.at) squares = sqrtf(squares * share);
    } else {
      const Floats low = Floats::of<T>(extremes.low), high = Floats::of<T>(extremes.high);
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) center.at[i] = 0.5f * low.at[i] + 0.5f * high.at[i];
      for_each_key(keys, [&](int i, float key) { spread.at[i] += fabsf(key - center.at[i]); });
#pragma unroll
      for (float& sum : spread.at) sum *= share;
    }
    Floats low, high;
#pragma unroll
    for (int i = 0; i < Vec::kElements; ++i) {
      low.at[i] = center.at[i] - spread.at[i];
      high.at[i] = center.at[i] + spread.at[i];
    }
    extremes.low = low.rounded<T>();
    extremes.high = high.rounded<T>();
  }

  // Call f(column, key) for the page's keys up to the last one written.
  template <typename F>
  __device__ void for_each_key(const T* keys, const F& f) const {
    for (int token = 0; token <= last_; ++token) {
      const Floats key = Floats::of<T>(load_once(keys + token * row_size()));
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) f(i, key.at[i]);
    }
  }

  const WriteKvParams& p_;
  const int head_;
  int begin_;               // the page's first token in the whole cache
  int first_, last_;        // written tokens of the page
  int first_slot_, count_;  // of the run
  T* page_rows_;            // the head's
  T* bounds_;
};

template <typename T, ScoreKind kScore>
__global__ void __launch_bounds__(kThreads, kResident)
    write_kv_kernel(const __grid_constant__ WriteKvParams p, const __grid_constant__ Deal deal) {
  // grid: [windows / kWarps, heads]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  // In prefill one window in several has the end of a run. Each warp begins one window further on
  // than the one before it, so that such windows are of different CTAs.
  const int stride = deal.stride.divisor(), turned = blockIdx.x + warp;
  const int window = warp * stride + turned - deal.stride.quotient(turned) * stride;

  // Find the ends of runs: slots followed by another page, by padding, or by nothing. The window
  // is the last lanes'; the other lanes have the slots before it, where runs may have begun.
  const Slots slots(p, (window + 1) * deal.window - kWarpSize);
  const int next = token_of(p, slots.first + lane + 1);
  const bool is_end =
      lane >= kWarpSize - deal.window && slots.token >= 0 &&
      (next < 0 || deal.page_size.quotient(next) != deal.page_size.quotient(slots.token));
  unsigned ends = __ballot_sync(kAllLanes, is_end);
  wait_for_previous_kernel();
  release_next_kernel();

  for (; ends != 0; ends &= ends - 1) {
    RunWriter<T, kScore>(p, deal, slots, __ffs(ends) - 1, blockIdx.y).run();
  }
}

using Kernel = void (*)(WriteKvParams, Deal);

template <typename T>
Kernel kernel_for(ScoreKind score) {
  switch (score) {
    case ScoreKind::kMinMax:
      return write_kv_kernel<T, ScoreKind::kMinMax>;
    case ScoreKind::kMeanStd:
      return write_kv_kernel<T, ScoreKind::kMeanStd>;
    case ScoreKind::kMidDev:
      return write_kv_kernel<T, ScoreKind::kMidDev>;
    case ScoreKind::kCodes:
      return write_kv_kernel<T, ScoreKind::kCodes>;
  }
  return nullptr;
}

}  // namespace

cudaError_t write_kv(const WriteKvParams& params, cudaStream_t stream) {
  // Windows are as short as lets all CTAs run at once: in decode a slot each.
  const int heads = params.cache.num_kv_heads;
  const int max_ctas = num_multiprocessors() * kResident;
  const auto ctas_of_head = [&](int window) {
    return div_up(div_up(params.num_slots, window), kWarps);
  };
  int window = 1;
  while (window < kMaxWindow && ctas_of_head(window) * heads > max_ctas) window *= 2;
  const int stride = ctas_of_head(window);
  const Deal deal = {window, Divisor(stride), Divisor(params.cache.page_size),
                     Divisor(params.cache.pages_per_block)};
  const Kernel kernel = params.cache.dtype == DType::kBFloat16
                            ? kernel_for<__nv_bfloat16>(params.score)
                            : kernel_for<__half>(params.score);
  return launch(kernel, dim3(stride, heads), kThreads, 0, stream, params, deal);
}

}  // namespace quest::cuda
