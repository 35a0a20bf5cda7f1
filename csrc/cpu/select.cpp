// Stage 3: choose each KV head's pages.
//
// A task is one row and KV head. Scores become integers of the same order; bisection finds the
// smallest chosen one in at most 32 counting passes, whatever the scores; one more pass writes the
// page numbers in ascending order.
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// Integers ordered as the scores; -0 equals +0, and a NaN comes above all.
inline Ints order_keys(Floats scores) {
  const Ints bits = bit_cast<Ints>(scores + broadcast(0.0f));
  const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return scores == scores ? ordered : Ints{} + 0x7fffffff;
}

// How many of `keys` are at least `threshold`. `num_keys` is a multiple of kLanes.
int count_at_least(const int32_t* keys, int num_keys, int32_t threshold) {
  Ints counts = {};
  for (int i = 0; i < num_keys; i += kLanes) {
    counts -= load_unaligned<Ints>(keys + i) >= threshold;  // a true lane is -1
  }
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
  return count;
}

// The largest threshold that at least `wanted` >= 1 keys reach: the wanted-th largest key.
int32_t find_threshold(const int32_t* keys, int num_keys, int wanted) {
  int64_t low = INT32_MIN, high = INT32_MAX;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (count_at_least(keys, num_keys, static_cast<int32_t>(middle)) >= wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return static_cast<int32_t>(low);
}

void select_pages(const float* scores, int num_pages, int budget_pages, const Kept& kept,
                  int32_t* pages) {
  // Pages [first_competing, end_competing) compete; the others are kept.
  const KeptPages of_row = kept_pages(kept, budget_pages);
  const int first_competing = of_row.first, end_competing = num_pages - of_row.newest;
  const int num_competing = end_competing - first_competing;
  const int wanted = budget_pages - of_row.first - of_row.newest;
  int taken = 0;
  while (taken < first_competing) {
    pages[taken] = taken;
    ++taken;
  }
  if (wanted > 0) {
    // Order the scores of the competing pages; pad with the lowest key.
    const int num_keys = div_up(num_competing, kLanes) * kLanes;
    int32_t* keys = static_cast<int32_t*>(scratch(Scratch::kThread, num_keys * sizeof(int32_t)));
    for (int i = 0; i < num_keys; i += kLanes) {
      float lanes[kLanes] = {};
      const int valid = min_of(num_competing - i, kLanes);
      memcpy(lanes, scores + first_competing + i, valid * sizeof(float));
      store_unaligned(keys + i, order_keys(load(lanes)));
      for (int lane = valid; lane < kLanes; ++lane) keys[i + lane] = INT32_MIN;
    }

    // Take all above the threshold, and as many equal to it as are still wanted, lowest first.
    const int32_t threshold = find_threshold(keys, num_keys, wanted);
    const int above = threshold == INT32_MAX ? 0 : count_at_least(keys, num_keys, threshold + 1);
    int equal_left = wanted - above;
    for (int i = 0; i < num_competing; ++i) {
      const int equal = (keys[i] == threshold) & (equal_left > 0);
      // Overwritten unless `taken` advances; at most the first entry of the newest pages.
      pages[taken] = first_competing + i;
      taken += (keys[i] > threshold) | equal;
      equal_left -= equal;
    }
  }
  for (int page = end_competing; page < num_pages; ++page) pages[taken++] = page;
}

}  // namespace

void select(const SelectParams& p) {
  parallel_for(static_cast<int64_t>(p.num_rows) * p.num_kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / p.num_kv_heads, kv_head = task % p.num_kv_heads;
      const int seq_len = p.seq_lens[row], budget_pages = p.budget_pages[row];
      if (!over_budget(seq_len, budget_pages, p.page_size)) continue;
      select_pages(p.scores + row * p.scores_row_stride + kv_head * p.scores_head_stride,
                   div_up(seq_len, p.page_size), budget_pages, p.kept,
                   p.pages + row * p.pages_row_stride + kv_head * p.pages_head_stride);
    }
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
