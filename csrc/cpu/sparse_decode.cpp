// Stage 4: attention over the selected pages, or over all of a row that fits its budget.
//
// A task is one split of a row's attended tokens for one KV head, all query heads of the group. It
// walks its split in chunks that stay in the first-level cache: logits, online softmax, then the
// weighted values. Splits depend only on the row, and are merged in order: the result depends on
// neither the number of threads nor the rest of the batch.
#include "../counters.h"
#include "../softmax_state.h"
#include "kernels.h"
#include "row_tasks.h"
#include "rows.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kChunkTokens = 32;
constexpr int kSplitTokens = 512;
constexpr int kMaxSplits = 32;
constexpr int kTokenTile = kRegisters / 8;   // with kMaxHeadTile, half the registers accumulate
constexpr int kVectorTile = kRegisters / 8;  // as kTokenTile
constexpr float kLowest = -0x1p126f;

static_assert(kSplitTokens % kChunkTokens == 0, "a chunk lies in one split");
static_assert(kChunkTokens % kLanes == 0, "logits are taken in whole vectors");
static_assert(kTokenTile * kMaxHeadTile * 2 == kRegisters, "accumulators take half the registers");

// Softmax-weighted sums of values that are not yet divided by their sum of weights.
struct Partial {
  float* values;        // [group_size, head_size]: Σ 2^(logit - max_log2) · v
  SoftmaxState* state;  // [group_size]
};

int64_t partial_floats(int group_size, int head_size) {
  return static_cast<int64_t>(group_size) * (head_size + 2);
}

Partial partial_at(float* memory, int group_size, int head_size) {
  float* state = memory + static_cast<int64_t>(group_size) * head_size;
  return {memory, reinterpret_cast<SoftmaxState*>(state)};
}

int attended_tokens(const SparseDecodeParams& p, int row) {
  const int seq_len = p.rows.seq_lens[row], budget_pages = p.rows.budget_pages[row];
  const int page_size = p.cache.page_size;
  if (!over_budget(seq_len, budget_pages, page_size)) return seq_len;
  // The newest page comes last and may be partly filled.
  return (budget_pages - 1) * page_size + (seq_len - 1) % page_size + 1;
}

// A row in at most kMaxSplits splits of whole kSplitTokens.
int split_tokens(int num_tokens) {
  return div_up(num_tokens, kSplitTokens * kMaxSplits) * kSplitTokens;
}

int num_splits(int num_tokens) {
  return num_tokens == 0 ? 0 : div_up(num_tokens, split_tokens(num_tokens));
}

// Finds the attended tokens of one row and KV head.
template <class T>
class TokenRows {
 public:
  TokenRows(const SparseDecodeParams& p, int row, int kv_head)
      : cache_(p.cache),
        head_(static_cast<const T*>(p.cache.data) + kv_head * p.cache.head_stride),
        block_table_(p.rows.block_table + row * p.rows.block_table_stride),
        pages_(over_budget(p.rows.seq_lens[row], p.rows.budget_pages[row], p.cache.page_size)
                   ? p.pages + row * p.pages_row_stride + kv_head * p.pages_head_stride
                   : nullptr) {}

  // Points rows[i] at key | value of attended token begin + i, for the tokens up to end.
  void find(int begin, int end, const T** rows) const {
    for (int token = begin; token < end;) {
      const int entry = token / cache_.page_size;
      const int page_end = min_of((entry + 1) * cache_.page_size, end);
      const int page = pages_ ? pages_[entry] : entry;
      const int first_row =
          page % cache_.pages_per_block * cache_.page_size + token % cache_.page_size;
      const T* from = head_ + block_table_[page / cache_.pages_per_block] * cache_.block_stride +
                      static_cast<int64_t>(first_row) * 2 * cache_.head_size;
      for (; token < page_end; ++token, from += 2 * cache_.head_size) rows[token - begin] = from;
    }
  }

 private:
  const KvCache& cache_;
  const T* head_;
  const int32_t* block_table_;
  const int32_t* pages_;  // null: all pages, in order
};

template <class T>
struct Chunk {
  const T* rows[kChunkTokens];  // [kChunkTokens] key | value of each token
  const T* next[kChunkTokens];  // the next chunk's rows, prefetched
  int num_tokens;
};

template <int kTokens, int kHeads, class T>
void dot(const T* const* rows, const T* const* next, const float* query, int head_size,
         float* logits) {
  constexpr int kPerHead = kTokens < kLanes ? kTokens : kLanes;
  Floats sums[kHeads][kTokens] = {};
  for (int d = 0; d < head_size; d += kLanes) {
    for (int token = 0; token < kTokens; ++token) {
      if (d * sizeof(T) % kLineBytes == 0) prefetch(next[token] + d);
      const Floats key = load(rows[token] + d);
      for (int head = 0; head < kHeads; ++head) {
        sums[head][token] += load(query + head * head_size + d) * key;
      }
    }
  }
  for (int head = 0; head < kHeads; ++head) {
    float lanes[kLanes];
    store_unaligned(lanes, sum_each(sums[head]));
    for (int token = 0; token < kTokens; ++token) {
      logits[head * kChunkTokens + token] = lanes[token * (kLanes / kPerHead)];
    }
  }
}

template <int kVectors, int kHeads, class T>
void add_values(const Chunk<T>& chunk, const float* weights, const float* rescale, int head_size,
                int d, float* values) {
  Floats sums[kVectors][kHeads];
  for (int i = 0; i < kVectors; ++i) {
    for (int head = 0; head < kHeads; ++head) {
      sums[i][head] = load(values + head * head_size + d + i * kLanes) * rescale[head];
    }
  }
  for (int token = 0; token < chunk.num_tokens; ++token) {
    const T* row = chunk.rows[token] + head_size + d;
    const T* next = chunk.next[token] + head_size + d;
    for (int i = 0; i < kVectors; ++i) {
      if (i * kLanes * sizeof(T) % kLineBytes == 0) prefetch(next + i * kLanes);
      const Floats value = load(row + i * kLanes);
      for (int head = 0; head < kHeads; ++head) {
        sums[i][head] += weights[head * kChunkTokens + token] * value;
      }
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    for (int head = 0; head < kHeads; ++head) {
      store_unaligned(values + head * head_size + d + i * kLanes, sums[i][head]);
    }
  }
}

// Turn one head's logits into weights 2^(logit - max); returns the factor for what came before.
float soften(float* logits, int num_tokens, float soft_cap, SoftmaxState& state) {
  if (soft_cap > 0) {
    for (int i = 0; i < num_tokens; i += kLanes) {
      store_unaligned(logits + i, tanh(load(logits + i) / soft_cap) * (soft_cap * kLog2e));
    }
  }
  for (int i = num_tokens; i < kChunkTokens; ++i) logits[i] = kLowest;
  Floats largest = broadcast(state.max_log2);
  for (int i = 0; i < kChunkTokens; i += kLanes) largest = max_of(largest, load(logits + i));
  float new_max = largest[0];
  for (int lane = 1; lane < kLanes; ++lane) new_max = max_of(new_max, largest[lane]);

  Floats weights = {};
  for (int i = 0; i < kChunkTokens; i += kLanes) {
    const Floats weight = exp2_nonpositive(load(logits + i) - new_max);
    store_unaligned(logits + i, weight);
    weights += weight;
  }
  const float rescale = exp2_nonpositive(broadcast(state.max_log2 - new_max))[0];
  state.sum = state.sum * rescale + sum(weights);
  state.max_log2 = new_max;
  return rescale;
}

template <int kHeads, class T>
void attend_chunk(const Chunk<T>& chunk, const float* query, int head_size, float soft_cap,
                  const Partial& partial) {
  alignas(64) float logits[kHeads * kChunkTokens] = {};
  float rescale[kHeads];

  // Multiply queries and keys.
  int token = 0;
  for (; token + kTokenTile <= chunk.num_tokens; token += kTokenTile) {
    dot<kTokenTile, kHeads>(chunk.rows + token, chunk.next + token, query, head_size,
                            logits + token);
  }
  for (; token < chunk.num_tokens; ++token) {
    dot<1, kHeads>(chunk.rows + token, chunk.next + token, query, head_size, logits + token);
  }

  // Update the online softmax.
  for (int head = 0; head < kHeads; ++head) {
    rescale[head] =
        soften(logits + head * kChunkTokens, chunk.num_tokens, soft_cap, partial.state[head]);
  }

  // Add the weighted values.
  int d = 0;
  for (; d + kVectorTile * kLanes <= head_size; d += kVectorTile * kLanes) {
    add_values<kVectorTile, kHeads>(chunk, logits, rescale, head_size, d, partial.values);
  }
  for (; d < head_size; d += kLanes) {
    add_values<1, kHeads>(chunk, logits, rescale, head_size, d, partial.values);
  }
}

template <class T>
void attend_split(const SparseDecodeParams& p, int row, int kv_head, int begin, int end,
                  const Partial& partial) {
  const int head_size = p.cache.head_size;

  // Scale the queries, so that logits come in units of log2.
  const float factor = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  float* query =
      static_cast<float*>(scratch(Scratch::kThread, sizeof(float) * p.group_size * head_size));
  for (int head = 0; head < p.group_size; ++head) {
    const T* from = static_cast<const T*>(p.query) + row * p.query_row_stride +
                    (kv_head * p.group_size + head) * p.query_head_stride;
    for (int d = 0; d < head_size; d += kLanes) {
      store_unaligned(query + head * head_size + d, load(from + d) * factor);
    }
  }

  // Start from nothing.
  memset(partial.values, 0, sizeof(float) * p.group_size * head_size);
  for (int head = 0; head < p.group_size; ++head) {
    partial.state[head] = {.max_log2 = kLowest, .sum = 0};
  }

  // Walk the chunks, each fetching the next.
  const TokenRows<T> token_rows(p, row, kv_head);
  Chunk<T> chunk = {};
  token_rows.find(begin, min_of(begin + kChunkTokens, end), chunk.next);
  for (int first = begin; first < end; first += kChunkTokens) {
    const int next = first + kChunkTokens;
    chunk.num_tokens = min_of(kChunkTokens, end - first);
    memcpy(chunk.rows, chunk.next, sizeof(chunk.rows));
    if (next < end) token_rows.find(next, min_of(next + kChunkTokens, end), chunk.next);
    for_head_tiles(p.group_size, [&]<int kHeads>(int head) {
      const Partial tile = {partial.values + head * head_size, partial.state + head};
      attend_chunk<kHeads>(chunk, query + head * head_size, head_size, p.soft_cap, tile);
    });
  }
}

// Add up one query head's splits in order, divide by the sum of weights, its sink's included, and
// round once.
template <class T>
void merge_head(const SparseDecodeParams& p, float* partials, int count, int query_head, T* out) {
  const int head_size = p.cache.head_size, head = query_head % p.group_size;
  const int64_t size = partial_floats(p.group_size, head_size);
  SoftmaxState merged = {.max_log2 = kLowest, .sum = 0};
  for (int split = 0; split < count; ++split) {
    const Partial partial = partial_at(partials + split * size, p.group_size, head_size);
    merged.max_log2 = max_of(merged.max_log2, partial.state[head].max_log2);
  }
  float sink_log2 = kLowest;
  if (p.sinks != nullptr) {
    sink_log2 = load_one(static_cast<const T*>(p.sinks) + query_head) * kLog2e;
    merged.max_log2 = max_of(merged.max_log2, sink_log2);
  }
  float* factors = static_cast<float*>(scratch(Scratch::kThread, sizeof(float) * kMaxSplits));
  for (int split = 0; split < count; ++split) {
    const Partial partial = partial_at(partials + split * size, p.group_size, head_size);
    const SoftmaxState& state = partial.state[head];
    factors[split] = exp2_nonpositive(broadcast(state.max_log2 - merged.max_log2))[0];
    merged.sum += state.sum * factors[split];
  }
  if (p.sinks != nullptr) {
    merged.sum += exp2_nonpositive(broadcast(sink_log2 - merged.max_log2))[0];
  }
  for (int d = 0; d < head_size; d += kLanes) {
    Floats values = {};
    for (int split = 0; split < count; ++split) {
      const Partial partial = partial_at(partials + split * size, p.group_size, head_size);
      values += load(partial.values + head * head_size + d) * factors[split];
    }
    if (count > 0) values /= merged.sum;
    for (int lane = 0; lane < kLanes; ++lane) store(out + d + lane, values[lane]);
  }
}

void count_rows(const SparseDecodeParams& p) {
  for (int row = 0; row < p.rows.num_rows; ++row) {
    const int seq_len = p.rows.seq_lens[row], budget_pages = p.rows.budget_pages[row];
    if (seq_len == 0) continue;
    const bool is_sparse = over_budget(seq_len, budget_pages, p.cache.page_size);
    const int64_t heads = p.cache.num_kv_heads;
    const int64_t pages = heads * div_up(seq_len, p.cache.page_size);
    p.counters[is_sparse ? kSparseRows : kDenseRows] += heads;
    p.counters[kPagesScored] += is_sparse ? pages : 0;
    p.counters[kPagesRead] += is_sparse ? heads * budget_pages : pages;
    p.counters[kPagesFull] += pages;
  }
}

}  // namespace

void sparse_decode(const SparseDecodeParams& p) {
  if (p.counters != nullptr) count_rows(p);
  const int num_kv_heads = p.cache.num_kv_heads;
  const RowTasks tasks(p.rows.num_rows, [&](int row) -> int64_t {
    return static_cast<int64_t>(num_kv_heads) * num_splits(attended_tokens(p, row));
  });
  const int64_t size = partial_floats(p.group_size, p.cache.head_size);
  float* partials =
      static_cast<float*>(scratch(Scratch::kPartials, sizeof(float) * size * tasks.count()));
  with_dtype(p.cache.dtype, [&]<class T>() {
    parallel_for(tasks.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowTask task = tasks[i];
        const int num_tokens = attended_tokens(p, task.row);
        const int splits = num_splits(num_tokens), tokens = split_tokens(num_tokens);
        const int first = task.index % splits * tokens;
        attend_split<T>(p, task.row, task.index / splits, first, min_of(first + tokens, num_tokens),
                        partial_at(partials + i * size, p.group_size, p.cache.head_size));
      }
    });
    parallel_for(static_cast<int64_t>(p.rows.num_rows) * num_kv_heads, [&](int64_t begin,
                                                                           int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int row = static_cast<int>(i / num_kv_heads);
        const int kv_head = static_cast<int>(i % num_kv_heads);
        const int splits = num_splits(attended_tokens(p, row));
        float* first = partials + (tasks.first_of(row) + kv_head * splits) * size;
        for (int in_group = 0; in_group < p.group_size; ++in_group) {
          const int head = kv_head * p.group_size + in_group;
          merge_head(p, first, splits, head,
                     static_cast<T*>(p.out) + row * p.out_row_stride + head * p.out_head_stride);
        }
      }
    });
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
