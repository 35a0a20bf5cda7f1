// Stage 1: store keys and values, and keep the bounds of their pages.
//
// A token is an index in the batch, a slot is a place in the cache, and a page is a page of the
// cache. A run is the tokens of one page that are written together: they are adjacent, and their
// slots ascend. One task stores whole runs, so it computes the page's bounds when the run ends.
#include "kernels.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int64_t kPadding = -1;

struct Bounds {
  Floats low, high;
};

// The minimum and maximum of `num_keys` keys, `stride` elements apart.
template <class T>
Bounds extremes(const T* keys, int num_keys, int stride) {
  Floats low = load(keys), high = low;
  for (int i = 1; i < num_keys; ++i) {
    const Floats key = load(keys + i * stride);
    low = min_of(low, key);
    high = max_of(high, key);
  }
  return {low, high};
}

// The keys' mean ∓ their population standard deviation.
template <class T>
Bounds mean_std(const T* keys, int num_keys, int stride) {
  Floats sum{}, squares{};
  for (int i = 0; i < num_keys; ++i) sum += load(keys + i * stride);
  const Floats mean = sum / static_cast<float>(num_keys);
  for (int i = 0; i < num_keys; ++i) {
    const Floats deviation = load(keys + i * stride) - mean;
    squares += deviation * deviation;
  }
  Floats spread = squares / static_cast<float>(num_keys);
  for (int lane = 0; lane < kLanes; ++lane) spread[lane] = __builtin_sqrtf(spread[lane]);
  return {mean - spread, mean + spread};
}

// The middle of the keys' extremes ∓ their mean absolute deviation from it.
template <class T>
Bounds mid_dev(const T* keys, int num_keys, int stride) {
  const auto [low, high] = extremes(keys, num_keys, stride);
  const Floats mid = 0.5f * low + 0.5f * high;
  Floats sum{};
  for (int i = 0; i < num_keys; ++i) {
    const Floats deviation = load(keys + i * stride) - mid;
    sum += deviation < Floats{} ? -deviation : deviation;
  }
  const Floats spread = sum / static_cast<float>(num_keys);
  return {mid - spread, mid + spread};
}

template <class T>
auto bounds_taker(ScoreKind score) {
  switch (score) {
    case ScoreKind::kMinMax:
      return extremes<T>;
    case ScoreKind::kMeanStd:
      return mean_std<T>;
    case ScoreKind::kMidDev:
      return mid_dev<T>;
    case ScoreKind::kCodes:
      break;  // no bounds
  }
  __builtin_unreachable();
}

// Write the bounds of a page's first `num_keys` keys, elementwise.
template <class T>
void write_bounds(const T* keys,  // [num_keys, 2 * head_size], the first half of each row
                  T* bounds,      // [2 * head_size]
                  int num_keys, int head_size, ScoreKind score) {
  const auto take = bounds_taker<T>(score);
  for (int d = 0; d < head_size; d += kLanes) {
    const auto [low, high] = take(keys + d, num_keys, 2 * head_size);
    for (int lane = 0; lane < kLanes; ++lane) {
      store(bounds + d + lane, low[lane]);
      store(bounds + head_size + d + lane, high[lane]);
    }
  }
}

// Write the run of tokens [begin, end).
template <class T>
void write_run(const WriteKvParams& p, int64_t begin, int64_t end) {
  const KvCache& cache = p.cache;
  const size_t row_bytes = sizeof(T) * cache.head_size;
  const int64_t block = p.slot_mapping[begin] / cache.block_tokens;
  const int last_offset = static_cast<int>(p.slot_mapping[end - 1] % cache.block_tokens);
  const int page_in_block = last_offset / cache.page_size;
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    T* rows = static_cast<T*>(cache.data) + block * cache.block_stride + head * cache.head_stride;

    // Store the keys and values.
    for (int64_t token = begin; token < end; ++token) {
      const int64_t offset = p.slot_mapping[token] % cache.block_tokens;
      T* row = rows + offset * 2 * cache.head_size;
      memcpy(row,
             static_cast<const T*>(p.key) + token * p.key_token_stride + head * p.key_head_stride,
             row_bytes);
      memcpy(row + cache.head_size,
             static_cast<const T*>(p.value) + token * p.value_token_stride +
                 head * p.value_head_stride,
             row_bytes);
    }

    if (p.score == ScoreKind::kCodes) continue;  // write_codes comes next

    // Recompute the page's bounds, up to the last slot written.
    const int first_offset = page_in_block * cache.page_size;
    write_bounds(rows + first_offset * 2 * cache.head_size,
                 rows + (cache.block_tokens + page_in_block) * 2 * cache.head_size,
                 last_offset - first_offset + 1, cache.head_size, p.score);
  }
}

}  // namespace

void write_kv(const WriteKvParams& p) {
  // Slots of one page share slot / page_size, since page_size divides block_tokens.
  const auto page_of = [&](int64_t token) {
    const int64_t slot = p.slot_mapping[token];
    return slot == kPadding ? kPadding : slot / p.cache.page_size;
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
