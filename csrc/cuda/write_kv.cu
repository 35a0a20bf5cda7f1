// write_kv: store keys and values in their slots, and take the touched pages' bounds anew.
//
// The slots of a page are adjacent in the slot mapping: a run. A warp handles one head of one run:
// each lane owns columns of 16 bytes of the cache's rows, copies them, and keeps the minimum and
// maximum of those that are keys; then it looks at the page's earlier keys, which no other warp of
// this launch writes.
//
// The other scores' bounds (score_kind.h) need the page's keys once or twice more, from L2.
//
// Bytes: 4 * head_size read and written per token and KV head; for a page not begun here also the
// keys before, and its bounds. Prefill copies at memory speed; decode waits for memory twice.
#include "device.cuh"
#include "launch.cuh"
#include "schedule.cuh"

namespace quest::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowsInFlight = 8;  // that a lane loads before it stores the first
constexpr int kWindow = 16;       // slots for a CTA where there are many
constexpr int kSmallBatch = 2048;

// The minimum and maximum of 8 columns.
template <typename T>
struct Extremes {
  Vec low, high;
  bool is_empty = true;

  __device__ void add(const Vec& row) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      low.word[w] = is_empty ? row.word[w] : min_pair<T>(low.word[w], row.word[w]);
      high.word[w] = is_empty ? row.word[w] : max_pair<T>(high.word[w], row.word[w]);
    }
    is_empty = false;
  }
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

template <typename T, ScoreKind kScore>
class RunWriter {
 public:
  __device__ RunWriter(const WriteKvParams& p, int last_slot, int head)
      : p_(p), lane_(threadIdx.x % kWarpSize), last_slot_(last_slot), head_(head) {
    const int64_t last_token = p.slot_mapping[last_slot];
    page_ = last_token / p.cache.page_size;
    last_ = static_cast<int>(last_token % p.cache.page_size);
  }

  __device__ void run() {
    const int count = count_slots();
    const int first =
        static_cast<int>(p_.slot_mapping[last_slot_ - count + 1] % p_.cache.page_size);
    // Keys of the page that count as well: those before the run, or, where it skips some, all.
    const bool skips = last_ - first + 1 != count;
    const int num_stored = skips ? last_ + 1 : first;

    const int64_t token = page_ * p_.cache.page_size;
    const int64_t block = token / p_.cache.block_tokens;
    const int token_in_block = static_cast<int>(token % p_.cache.block_tokens);
    const int head_size = p_.cache.head_size, row_size = 2 * head_size;
    T* block_rows = static_cast<T*>(p_.cache.data) + block * p_.cache.block_stride +
                    head_ * p_.cache.head_stride;
    T* page_rows = block_rows + token_in_block * row_size;
    T* bounds =
        block_rows + (p_.cache.block_tokens + token_in_block / p_.cache.page_size) * row_size;

    for (int column = Vec::kElements * lane_; column < row_size;
         column += Vec::kElements * kWarpSize) {
      const bool is_key = column < head_size;
      Extremes<T> extremes;
      if (is_key && !skips) read_stored(num_stored, page_rows + column, extremes);
      copy_run(count, column, is_key, page_rows, extremes);
      if (!is_key) continue;
      if (skips) read_stored(num_stored, page_rows + column, extremes);
      if constexpr (kScore != ScoreKind::kMinMax) estimate(page_rows + column, extremes);
      store(bounds + column, extremes.low);
      store(bounds + head_size + column, extremes.high);
    }
  }

 private:
  // How many slots up to the last lie in its page. The page has no more tokens than that.
  __device__ int count_slots() const {
    int count = 0;
    while (true) {
      const int slot = last_slot_ - count - lane_;
      const int64_t token = slot >= 0 ? p_.slot_mapping[slot] : -1;
      const bool in_page = token >= 0 && token / p_.cache.page_size == page_;
      const int found = __ffs(~__ballot_sync(kAllLanes, in_page)) - 1;
      if (found >= 0) return count + found;
      count += kWarpSize;
    }
  }

  __device__ void copy_run(int count, int column, bool is_key, T* page_rows,
                           Extremes<T>& extremes) const {
    const T* from = is_key ? static_cast<const T*>(p_.key) + head_ * p_.key_head_stride + column
                           : static_cast<const T*>(p_.value) + head_ * p_.value_head_stride +
                                 column - p_.cache.head_size;
    const int64_t token_stride = is_key ? p_.key_token_stride : p_.value_token_stride;
    const int first_slot = last_slot_ - count + 1;
    for (int i = 0; i < count; i += kRowsInFlight) {
      Vec rows[kRowsInFlight];
      int offsets[kRowsInFlight];
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        const int slot = first_slot + min(i + k, count - 1);
        rows[k] = load_once(from + slot * token_stride);
        offsets[k] = static_cast<int>(p_.slot_mapping[slot] - page_ * p_.cache.page_size);
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        if (i + k >= count) continue;
        store(page_rows + offsets[k] * 2 * p_.cache.head_size + column, rows[k]);
        if (is_key) extremes.add(rows[k]);
      }
    }
  }

  __device__ void read_stored(int num_stored, const T* keys, Extremes<T>& extremes) const {
    constexpr int kInFlight = 16;
    for (int i = 0; i < num_stored; i += kInFlight) {
      Vec rows[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        rows[k] = load_once(keys + min(i + k, num_stored - 1) * 2 * p_.cache.head_size);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) extremes.add(rows[k]);
    }
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
      const Floats key = Floats::of<T>(load_once(keys + token * 2 * p_.cache.head_size));
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) f(i, key.at[i]);
    }
  }

  const WriteKvParams& p_;
  const int lane_, last_slot_, head_;
  int64_t page_;  // number in the whole cache
  int last_;      // written token of the page
};

template <typename T, ScoreKind kScore>
__global__ void __launch_bounds__(kThreads)
    write_kv_kernel(const __grid_constant__ WriteKvParams p, int window, int parts) {
  // grid: [windows of slots, parts of the heads]; a CTA handles the runs that end in its window, a
  // warp one head each.
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  // Find the ends of runs: slots followed by another page, by padding, or by nothing.
  const int first_slot = blockIdx.x / parts * window, slot = first_slot + lane;
  bool is_end = false;
  if (lane < window && slot < p.num_slots && p.slot_mapping[slot] >= 0) {
    const int64_t next = slot + 1 < p.num_slots ? p.slot_mapping[slot + 1] : -1;
    is_end = next < 0 || next / p.cache.page_size != p.slot_mapping[slot] / p.cache.page_size;
  }
  const unsigned ends = __ballot_sync(kAllLanes, is_end);
  wait_for_previous_kernel();
  release_next_kernel();

  const int part = blockIdx.x % parts, heads = div_up(p.cache.num_kv_heads - part, parts);
  for (int pair = warp; pair < __popc(ends) * heads; pair += kWarps) {
    const int run = pair / heads, head = pair % heads * parts + part;
    RunWriter<T, kScore>(p, first_slot + __fns(ends, 0, run + 1), head).run();
  }
}

using Kernel = void (*)(WriteKvParams, int, int);

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
  const int window = params.num_slots <= kSmallBatch ? 1 : kWindow;
  const int parts = window == 1 ? div_up(params.cache.num_kv_heads, kWarps) : 1;
  const int ctas = div_up(params.num_slots, window) * parts;
  const Kernel kernel = params.cache.dtype == DType::kBFloat16
                            ? kernel_for<__nv_bfloat16>(params.score)
                            : kernel_for<__half>(params.score);
  return launch(kernel, ctas, kThreads, 0, stream, params, window, parts);
}

}  // namespace quest::cuda
