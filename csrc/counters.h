// What sparse_decode and cluster_decode count, in the order of their `counters` tensor. A call is
// one layer. Every (row, KV head) of a call counts once; padding rows do not count. For each row
// the kernel adds num_kv_heads times the following numbers.
//
//   A row over its budget: 1 sparse row, its pages as scored, its budget as read, its pages as
//   full. Any other row:         1 dense row, its pages as read, its pages as full.
#pragma once

namespace quest {

enum Counter {
  kSparseRows,
  kDenseRows,
  kPagesScored,  // Bounds that were read: all pages' in a row over its budget.
  kPagesRead,    // Pages whose keys and values were read.
  kPagesFull,    // Pages that full attention would have read.
  kNumCounters
};

}  // namespace quest
