// Stage 1: store keys and values, and keep the bounds of their pages.
//
// A run is the slots of one page that are written together: adjacent, ascending. One task stores
// whole runs, so the page's bounds can be taken as soon as the run ends.
#include "kernels.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int64_t kPadding = -1;

struct Bounds {
  Floats low, high;
};

// The minimum and maximum of `num_tokens` keys, `stride` elements apart.
template <class T>
Bounds extremes(const T* keys, int num_tokens, int stride) {
  Floats low = load(keys), high = low;
  for (int token = 1; token < num_tokens; ++token) {
    const Floats key = load(keys + token * stride);
    low = min_of(low, key);
    high = max_of(high, key);
  }
  return {low, high};
}

// Their mean, less and plus their standard deviation.
template <class T>
Bounds mean_std(const T* keys, int num_tokens, int stride) {
  Floats sum{}, squares{};
  for (int token = 0; token < num_tokens; ++token) sum += load(keys + token * stride);
  const Floats mean = sum / static_cast<float>(num_tokens);
  for (int token = 0; token < num_tokens; ++token) {
    const Floats deviation = load(keys + token * stride) - mean;
    squares += deviation * deviation;
  }
  Floats spread = squares / static_cast<float>(num_tokens);
  for (int lane = 0; lane < kLanes; ++lane) spread[lane] = __builtin_sqrtf(spread[lane]);
  return {mean - spread, mean + spread};
}

// The middle of their extremes, less and plus their mean absolute deviation from it.
template <class T>
Bounds mid_dev(const T* keys, int num_tokens, int stride) {
  const auto [low, high] = extremes(keys, num_tokens, stride);
  const Floats mid = 0.5f * low + 0.5f * high;
  Floats sum{};
  for (int token = 0; token < num_tokens; ++token) {
    const Floats deviation = load(keys + token * stride) - mid;
    sum += deviation < Floats{} ? -deviation : deviation;
  }
  const Floats spread = sum / static_cast<float>(num_tokens);
  return {mid - spread, mid + spread};
}

// Take the bounds of a page's first `num_tokens` keys, elementwise.
template <class T>
void write_bounds(const T* keys,  // [num_tokens, 2 * head_size], the first half of each row
                  T* bounds,      // [2 * head_size]
                  int num_tokens, int head_size, ScoreKind score) {
  const auto take = score == ScoreKind::kMinMax    ? extremes<T>
                    : score == ScoreKind::kMeanStd ? mean_std<T>
                                                   : mid_dev<T>;
  for (int d = 0; d < head_size; d += kLanes) {
    const auto [low, high] = take(keys + d, num_tokens, 2 * head_size);
    for (int lane = 0; lane < kLanes; ++lane) {
      store(bounds + d + lane, low[lane]);
      store(bounds + head_size + d + lane, high[lane]);
    }
  }
}

template <class T>
void write_run(const WriteKvParams& p, int64_t begin, int64_t end) {
  const KvCache& cache = p.cache;
  const size_t row_bytes = sizeof(T) * cache.head_size;
  const int64_t block = p.slot_mapping[begin] / cache.block_tokens;
  const int last_token = static_cast<int>(p.slot_mapping[end - 1] % cache.block_tokens);
  const int page = last_token / cache.page_size;
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    T* rows = static_cast<T*>(cache.data) + block * cache.block_stride + head * cache.head_stride;

    // Store the keys and values.
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = p.slot_mapping[i] % cache.block_tokens;
      T* row = rows + token * 2 * cache.head_size;
      memcpy(row, static_cast<const T*>(p.key) + i * p.key_token_stride + head * p.key_head_stride,
             row_bytes);
      memcpy(row + cache.head_size,
             static_cast<const T*>(p.value) + i * p.value_token_stride + head * p.value_head_stride,
             row_bytes);
    }

    if (p.score == ScoreKind::kCodes) continue;  // write_codes comes next

    // Take the page's bounds anew, up to the last token written.
    const int first_token = page * cache.page_size;
    write_bounds(rows + first_token * 2 * cache.head_size,
                 rows + (cache.block_tokens + page) * 2 * cache.head_size,
                 last_token - first_token + 1, cache.head_size, p.score);
  }
}

}  // namespace

void write_kv(const WriteKvParams& p) {
  // Slots of one page share slot / page_size, since page_size divides block_tokens.
  const auto page_of = [&](int64_t i) {
    return p.slot_mapping[i] == kPadding ? kPadding : p.slot_mapping[i] / p.cache.page_size;
  };
  with_dtype(p.cache.dtype, [&]<class T>() {
    parallel_for(p.num_slots, [&](int64_t begin, int64_t end) {
      // A run belongs to the task in which it starts.
      while (begin > 0 && begin < end && page_of(begin) == page_of(begin - 1)) ++begin;
      while (begin < end) {
        int64_t run_end = begin + 1;
        while (run_end < p.num_slots && page_of(run_end) == page_of(begin)) ++run_end;
        if (page_of(begin) != kPadding) write_run<T>(p, begin, run_end);
        begin = run_end;
      }
    });
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
