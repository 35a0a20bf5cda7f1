// What each stage's kernel is given, on CPU and GPU alike. Dimension names: see vllm_quest/ops.py.
// The dtype of the model is that of the cache, unless that is fp8.
// Strides count elements. Lengths count tokens, budgets count pages; on a GPU both are read on the
// device alone.
#pragma once

#include <cstdint>

#include "codes.h"
#include "kept.h"
#include "score_kind.h"
#include "softmax_state.h"

namespace quest {

// A CPU takes the first three, a GPU the first two and the last: e4m3, with bf16 outside the cache.
enum class DType { kBFloat16, kFloat16, kFloat32, kFloat8 };

struct KvCache {
  void* data;            // [num_blocks, num_kv_heads, block_rows, 2 * head_size] dtype
  int64_t block_stride;  // stride of num_blocks
  int64_t head_stride;   // stride of num_kv_heads
  DType dtype;
  int num_kv_heads;
  int head_size;
  int block_tokens;
  int page_size;
  int pages_per_block;
};

// What the elements of an fp8 cache are multiplied with, on the device. Null for other caches.
struct KvScales {
  const float* key;
  const float* value;
};

// Decode rows: a query token each.
struct Rows {
  const int32_t* block_table;   // [num_rows, max_blocks]
  int64_t block_table_stride;   // stride of num_rows
  const int32_t* seq_lens;      // [num_rows] tokens
  const int32_t* budget_pages;  // [num_rows]
  int num_rows;
  int max_blocks;
};

struct WriteKvParams {
  KvCache cache;
  const void* key;              // [num_slots, num_kv_heads, head_size] dtype of the model
  const void* value;            // [num_slots, num_kv_heads, head_size] dtype of the model
  const int64_t* slot_mapping;  // [num_slots] block * block_tokens + offset, or -1
  int64_t key_token_stride, key_head_stride;
  int64_t value_token_stride, value_head_stride;
  int num_slots;
  ScoreKind score;
};

struct ScoreParams {
  KvCache cache;
  Rows rows;
  const void* query;  // [num_rows, num_heads, head_size] dtype of the model
  float* scores;      // out: [num_rows, num_kv_heads, max_pages]
  int64_t query_row_stride, query_head_stride;
  int64_t scores_row_stride, scores_head_stride;
  int group_size;
};

// What pages are estimated to weigh, log2 of the sum of e^logit over their tokens, and behind them
// what groups of kGroupTokens tokens do.
struct Masses {
  float* data;  // [num_rows, num_heads, first_group + max_groups]; null: there are none
  int64_t row_stride, head_stride;
  int first_group;  // the column of the first group: max_pages, rounded up to 4
};

struct ScoreCodesParams {
  KvCache cache;
  Rows rows;
  const void* query;  // [num_rows, num_heads, head_size] dtype of the model
  Masses masses;      // scratch
  float* scores;      // out: [num_rows, num_kv_heads, max_pages]
  int64_t query_row_stride, query_head_stride;
  int64_t scores_row_stride, scores_head_stride;
  int group_size;
  float scale;
  float soft_cap;  // 0 for none
};

struct SelectParams {
  const float* scores;          // [num_rows, num_kv_heads, max_pages]
  const int32_t* seq_lens;      // [num_rows] tokens
  const int32_t* budget_pages;  // [num_rows]
  int32_t* pages;               // out: [num_rows, num_kv_heads, max_selected]
  int64_t scores_row_stride, scores_head_stride;
  int64_t pages_row_stride, pages_head_stride;
  int num_rows;
  int num_kv_heads;
  int max_pages;
  int page_size;
  Kept kept;
};

// Where the CTAs of a GPU leave partial results of (row, KV head) pairs that several of them attend
// to. Null on the CPU.
struct DecodeWorkspace {
  // One per CTA: how many CTAs have left their part of the (row, KV head) that begins in this one.
  // 0 between launches.
  int32_t* arrivals;            // [max_decode_ctas]
  float* partial_out;           // [max_decode_ctas, 2, group_size, head_size] weighted values
  SoftmaxState* partial_state;  // [max_decode_ctas, 2, group_size]
};

struct SparseDecodeParams {
  KvCache cache;
  Rows rows;
  const void* query;     // [num_rows, num_heads, head_size] dtype of the model
  const int32_t* pages;  // [num_rows, num_kv_heads, max_selected]
  void* out;             // out: [num_rows, num_heads, head_size] dtype of the model
  DecodeWorkspace workspace;
  int64_t query_row_stride, query_head_stride;
  int64_t pages_row_stride, pages_head_stride;
  int64_t out_row_stride, out_head_stride;
  int group_size;
  float scale;
  float soft_cap;     // 0 for none
  int64_t* counters;  // [kNumCounters] added to, see counters.h; null for none
  const void* sinks;  // [num_heads] dtype of the model, logits without values; null for none
};

struct ClusterDecodeParams {
  SparseDecodeParams decode;  // without pages
  Masses masses;              // what pages are chosen by, where keys have codes
  Kept kept;
  // Nothing was launched since write_kv of the same layer; all else that is read was there before
  // write_kv began.
  bool follows_write_kv;
};

// Scratch of cluster_decode in device memory: the keys of rows that have more pages than shared
// memory has room for.
struct FarKeys {
  uint32_t* data;  // [num_rows, num_kv_heads, max_pages]; null: all rows' keys fit shared memory
  int64_t row_stride, head_stride;
};

}  // namespace quest
