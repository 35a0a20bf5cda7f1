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
  int window;  // slots
  Divisor heads, page_size, pages_per_block;
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

// Where a slot's token is in the cache, counted over all blocks; negative for padding.
__device__ __forceinline__ int token_of(const WriteKvParams& p, int slot) {
  return static_cast<int>(p.slot_mapping[slot]);
}

template <typename T, ScoreKind kScore>
class RunWriter {
 public:
  __device__ RunWriter(const WriteKvParams& p, const Deal& deal, int last_slot, int head)
      : p_(p), lane_(threadIdx.x % kWarpSize), last_slot_(last_slot), head_(head) {
    const int token = token_of(p, last_slot), page_size = p.cache.page_size;
    const int page = deal.page_size.quotient(token);
    begin_ = page * page_size;
    last_ = token - begin_;
    const int block = deal.pages_per_block.quotient(page);
    const int page_in_block = page - block * p.cache.pages_per_block;
    T* rows =
        static_cast<T*>(p.cache.data) + block * p.cache.block_stride + head * p.cache.head_stride;
    page_rows_ = rows + page_in_block * page_size * row_size();
    bounds_ = rows + (p.cache.block_tokens + page_in_block) * row_size();
  }

  __device__ void run() {
    const int count = count_slots(), first_slot = last_slot_ - count + 1;
    const int first = token_of(p_, first_slot) - begin_;
    const bool skips_tokens = last_ - first + 1 != count;
    for (int column = Vec::kElements * lane_; column < row_size();
         column += Vec::kElements * kWarpSize) {
      const bool is_key = column < p_.cache.head_size;
      const New from =
          is_key ? New{static_cast<const T*>(p_.key) + head_ * p_.key_head_stride +
                           first_slot * p_.key_token_stride + column,
                       p_.key_token_stride}
                 : New{static_cast<const T*>(p_.value) + head_ * p_.value_head_stride +
                           first_slot * p_.value_token_stride + column - p_.cache.head_size,
                       p_.value_token_stride};
      const Extremes<T> extremes = skips_tokens
                                       ? copy_each(from, first_slot, count, column)
                                       : copy(from, first, count, is_key, page_rows_ + column);
      if (is_key) store_bounds(extremes, column);
    }
  }

 private:
  // A lane's columns of the run's new keys or values.
  struct New {
    const T* first;
    int64_t token_stride;
  };

  __device__ int row_size() const { return 2 * p_.cache.head_size; }

  // How many slots up to the last lie in its page. The page has no more tokens than that.
  __device__ int count_slots() const {
    int count = 0;
    while (true) {
      const int slot = last_slot_ - count - lane_;
      const int offset = slot >= 0 ? token_of(p_, slot) - begin_ : -1;
      const bool in_page = offset >= 0 && offset < p_.cache.page_size;
      const int found = __ffs(~__ballot_sync(kAllLanes, in_page)) - 1;
      if (found >= 0) return count + found;
      count += kWarpSize;
    }
  }

  // Copy a run of `count` tokens from `first` on to the page's rows; the extremes of its columns,
  // with those of the keys before.
  __device__ Extremes<T> copy(const New& from, int first, int count, bool is_key, T* rows) const {
    Extremes<T> extremes;
    for (int i = 0; i < count; i += kNewInFlight) {
      Vec added[kNewInFlight];
#pragma unroll
      for (int k = 0; k < kNewInFlight; ++k) {
        if (k < count - i) added[k] = load_once(from.first + (i + k) * from.token_stride);
      }
      if (i == 0 && is_key) read_stored(first, rows, extremes);
#pragma unroll
      for (int k = 0; k < kNewInFlight; ++k) {
        if (k < count - i) {
          store(rows + (first + i + k) * row_size(), added[k]);
          extremes.add(added[k]);
        }
      }
    }
    return extremes;
  }

  __device__ void read_stored(int num_stored, const T* rows, Extremes<T>& extremes) const {
    for (int i = 0; i < num_stored; i += kStoredInFlight) {
      Vec stored[kStoredInFlight];
#pragma unroll
      for (int k = 0; k < kStoredInFlight; ++k) {
        stored[k] = load_once(rows + min(i + k, num_stored - 1) * row_size());
      }
#pragma unroll
      for (int k = 0; k < kStoredInFlight; ++k) extremes.add(stored[k]);
    }
  }

  // The same for a run that skips tokens of its page, which is rare: one token after the other.
  __device__ Extremes<T> copy_each(const New& from, int first_slot, int count, int column) const {
    for (int i = 0; i < count; ++i) {
      const int offset = token_of(p_, first_slot + i) - begin_;
      store(page_rows_ + offset * row_size() + column,
            load_once(from.first + i * from.token_stride));
    }
    Extremes<T> extremes;
    for (int i = 0; i <= last_; ++i) extremes.add(load_once(page_rows_ + i * row_size() + column));
    return extremes;
  }

  __device__ void store_bounds(Extremes<T> extremes, int column) const {
    if constexpr (kScore != ScoreKind::kMinMax) estimate(page_rows_ + column, extremes);
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
  const int lane_, last_slot_, head_;
  int begin_;     // the page's first token in the whole cache
  int last_;      // written token of the page
  T* page_rows_;  // the head's
  T* bounds_;
};

template <typename T, ScoreKind kScore>
__global__ void __launch_bounds__(kThreads, kResident)
    write_kv_kernel(const __grid_constant__ WriteKvParams p, const __grid_constant__ Deal deal) {
  // grid: warps for [windows of slots, heads]
  const int lane = threadIdx.x % kWarpSize;
  const int warp = (blockIdx.x * kThreads + threadIdx.x) / kWarpSize;
  const int window = deal.heads.quotient(warp), head = warp - window * p.cache.num_kv_heads;

  // Find the ends of runs: slots followed by another page, by padding, or by nothing.
  const int first_slot = window * deal.window, slot = first_slot + lane;
  bool is_end = false;
  if (lane < deal.window && slot < p.num_slots) {
    const int token = token_of(p, slot), next = slot + 1 < p.num_slots ? token_of(p, slot + 1) : -1;
    is_end =
        token >= 0 && (next < 0 || deal.page_size.quotient(next) != deal.page_size.quotient(token));
  }
  unsigned ends = __ballot_sync(kAllLanes, is_end);
  wait_for_previous_kernel();
  release_next_kernel();

  for (; ends != 0; ends &= ends - 1) {
    RunWriter<T, kScore>(p, deal, first_slot + __ffs(ends) - 1, head).run();
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
  }
  return nullptr;
}

}  // namespace

cudaError_t write_kv(const WriteKvParams& params, cudaStream_t stream) {
  // Windows are as short as lets all warps run at once: in decode a slot each.
  const int heads = params.cache.num_kv_heads;
  const int warps_at_once = num_multiprocessors() * kResident * kWarps;
  int window = 1;
  while (window < kMaxWindow && div_up(params.num_slots, window) * heads > warps_at_once) {
    window *= 2;
  }
  const Deal deal = {window, Divisor(heads), Divisor(params.cache.page_size),
                     Divisor(params.cache.pages_per_block)};
  const int ctas = div_up(div_up(params.num_slots, window) * heads, kWarps);
  const Kernel kernel = params.cache.dtype == DType::kBFloat16
                            ? kernel_for<__nv_bfloat16>(params.score)
                            : kernel_for<__half>(params.score);
  return launch(kernel, ctas, kThreads, 0, stream, params, deal);
}

}  // namespace quest::cuda
