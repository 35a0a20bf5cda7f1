// Properties of a decode row that follow from its length and budget.
#pragma once

namespace quest {

// Static: every instruction set's objects keep their own copy.
static inline int div_up(int n, int d) { return n / d + (n % d != 0); }

static inline bool over_budget(int seq_len, int budget_pages, int page_size) {
  return div_up(seq_len, page_size) > budget_pages;
}

}  // namespace quest
