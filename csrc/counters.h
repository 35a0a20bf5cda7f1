// What sparse_decode counts, in the order of its `counters` tensor. Every (row, KV head) of a call
// counts once, but for padding rows; a call is one layer. Whoever decodes a row adds, per row,
// num_kv_heads times the following:
//
//   over its budget: 1 sparse row, its pages scored, its budget read, its pages full
//   else:            1 dense row, its pages read, its pages full
#pragma once

namespace quest {

enum Counter {
  kSparseRows,
  kDenseRows,
  kPagesScored,  // bounds read: `score` reads those of every page of a row over its budget
  kPagesRead,    // keys and values read
  kPagesFull,    // that full attention would have read
  kNumCounters
};

}  // namespace quest
