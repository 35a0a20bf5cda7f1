// Properties of a decode row that follow from its length and budget.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "../counters.h"
#include "../params.h"

namespace quest::cuda {

// A row that fits its budget and has more tokens is dealt to all CTAs: one cluster alone would
// attend to it for long.
constexpr int kLongDenseTokens = 8192;

__host__ __device__ constexpr int div_up(int n, int d) { return n / d + (n % d != 0); }

__device__ __forceinline__ bool over_budget(int seq_len, int budget_pages, int page_size) {
  return seq_len > int64_t{budget_pages} * page_size;
}

__device__ __forceinline__ bool is_long_dense(int seq_len, int budget_pages, int page_size) {
  return seq_len > kLongDenseTokens && !over_budget(seq_len, budget_pages, page_size);
}

// Add what a row reads in all its KV heads to the counters. Called by one thread of a grid.
__device__ inline void count_row(int64_t* counters, int num_kv_heads, int pages, int budget_pages) {
  if (pages == 0) return;
  const auto add = [&](int counter, int64_t n) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counters) + counter,
              static_cast<unsigned long long>(n * num_kv_heads));
  };
  const bool is_sparse = pages > budget_pages;
  add(is_sparse ? kSparseRows : kDenseRows, 1);
  if (is_sparse) add(kPagesScored, pages);
  add(kPagesRead, min(pages, budget_pages));
  add(kPagesFull, pages);
}

}  // namespace quest::cuda
