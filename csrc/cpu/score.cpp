// Stage 2: bound q·k from above for every page.
//
// A task scores kTaskPages pages of one row for one KV head. The positive part of q meets the
// page's maximum, the negative part its minimum: relu(q) · max + min(q, 0) · min.
#include "kernels.h"
#include "row_tasks.h"
#include "rows.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kTaskPages = 64;
constexpr int kPageTile = 2;
constexpr int kPrefetchPages = 32;

// The query heads of one KV head, split by sign, as floats.
struct SignedQuery {
  const float* positive;  // [group_size, head_size]
  const float* negative;  // [group_size, head_size]
};

template <class T>
SignedQuery split_by_sign(const ScoreParams& p, int row, int kv_head) {
  const int head_size = p.cache.head_size;
  const int64_t size = static_cast<int64_t>(p.group_size) * head_size;
  float* positive = static_cast<float*>(scratch(Scratch::kThread, 2 * size * sizeof(float)));
  float* negative = positive + size;
  for (int head = 0; head < p.group_size; ++head) {
    const T* query = static_cast<const T*>(p.query) + row * p.query_row_stride +
                     (kv_head * p.group_size + head) * p.query_head_stride;
    for (int d = 0; d < head_size; d += kLanes) {
      const Floats q = load(query + d);
      store_unaligned(positive + head * head_size + d, max_of(q, Floats{}));
      store_unaligned(negative + head * head_size + d, min_of(q, Floats{}));
    }
  }
  return {positive, negative};
}

// Raise each page's score to the largest among kHeads query heads.
template <int kPages, int kHeads, class T>
void score_heads(const T* bounds,  // [kPages, 2 * head_size] minimum | maximum
                 const T* next,    // [kPages, 2 * head_size] later bounds, prefetched
                 const float* positive, const float* negative, int head_size, float* scores) {
  Floats sums[kHeads][kPages] = {};
  for (int d = 0; d < head_size; d += kLanes) {
    for (int page = 0; page < kPages; ++page) {
      const int low_at = page * 2 * head_size + d, high_at = low_at + head_size;
      if (d * sizeof(T) % kLineBytes == 0) {
        prefetch(next + low_at);
        prefetch(next + high_at);
      }
      const Floats low = load(bounds + low_at);
      const Floats high = load(bounds + high_at);
      for (int head = 0; head < kHeads; ++head) {
        sums[head][page] += load(negative + head * head_size + d) * low;
        sums[head][page] += load(positive + head * head_size + d) * high;
      }
    }
  }
  Floats best = sum_each(sums[0]);
  for (int head = 1; head < kHeads; ++head) best = max_of(best, sum_each(sums[head]));
  for (int page = 0; page < kPages; ++page) {
    scores[page] = max_of(scores[page], best[page * (kLanes / kPages)]);
  }
}

template <int kPages, class T>
void score_group(const T* bounds, const T* next, const SignedQuery& query, int group_size,
                 int head_size, float* scores) {
  for (int page = 0; page < kPages; ++page) scores[page] = -__builtin_inff();
  for_head_tiles(group_size, [&]<int kHeads>(int head) {
    score_heads<kPages, kHeads>(bounds, next, query.positive + head * head_size,
                                query.negative + head * head_size, head_size, scores);
  });
}

template <class T>
void score_pages(const ScoreParams& p, int row, int kv_head, int begin, int end) {
  const KvCache& cache = p.cache;
  const int row_size = 2 * cache.head_size;
  const int num_blocks =
      div_up(div_up(p.rows.seq_lens[row], cache.page_size), cache.pages_per_block);
  const int32_t* block_table = p.rows.block_table + row * p.rows.block_table_stride;
  const T* head = static_cast<const T*>(cache.data) + kv_head * cache.head_stride +
                  static_cast<int64_t>(cache.block_tokens) * row_size;
  float* scores = p.scores + row * p.scores_row_stride + kv_head * p.scores_head_stride;
  const SignedQuery query = split_by_sign<T>(p, row, kv_head);

  int page = begin;
  while (page < end) {
    const int block = page / cache.pages_per_block, first = page % cache.pages_per_block;
    const T* bounds = head + block_table[block] * cache.block_stride + first * row_size;
    const int block_end = min_of((block + 1) * cache.pages_per_block, end);
    const int ahead = block + div_up(kPrefetchPages, cache.pages_per_block);
    const T* next = ahead < num_blocks ? head + block_table[ahead] * cache.block_stride : bounds;

    // Bounds of a block are contiguous, but blocks are scattered: prefetch a later one.
    const auto step = [&]<int kPages>() {
      score_group<kPages>(bounds, next + page % cache.pages_per_block * row_size, query,
                          p.group_size, cache.head_size, scores + page);
      bounds += kPages * row_size;
      page += kPages;
    };
    while (page + kPageTile <= block_end) step.template operator()<kPageTile>();
    while (page < block_end) step.template operator()<1>();
  }
}

}  // namespace

void score(const ScoreParams& p) {
  const int num_kv_heads = p.cache.num_kv_heads;
  const RowTasks tasks(p.rows.num_rows, [&](int row) -> int64_t {
    const int seq_len = p.rows.seq_lens[row];
    if (!over_budget(seq_len, p.rows.budget_pages[row], p.cache.page_size)) return 0;
    return static_cast<int64_t>(num_kv_heads) *
           div_up(div_up(seq_len, p.cache.page_size), kTaskPages);
  });
  with_dtype(p.cache.dtype, [&]<class T>() {
    parallel_for(tasks.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowTask task = tasks[i];
        const int num_pages = div_up(p.rows.seq_lens[task.row], p.cache.page_size);
        const int num_chunks = div_up(num_pages, kTaskPages);
        const int first = task.index % num_chunks * kTaskPages;
        score_pages<T>(p, task.row, task.index / num_chunks, first,
                       min_of(first + kTaskPages, num_pages));
      }
    });
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
