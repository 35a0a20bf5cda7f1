// The pages that a row over its budget attends to whatever their scores.
#pragma once

#ifdef __CUDACC__
#define QUEST_HOST_DEVICE __host__ __device__
#else
#define QUEST_HOST_DEVICE
#endif

namespace quest {

// The setting: see `select` in vllm_quest/ops.py.
struct Kept {
  int first_pages;     // at the row's front, at most
  int newest_percent;  // of the budget
};

// How many pages of a row are kept at its two ends. The pages between them compete.
struct KeptPages {
  int first, newest;
};

// Static: every instruction set's objects keep their own copy.
QUEST_HOST_DEVICE static inline KeptPages kept_pages(const Kept& kept, int budget_pages) {
  const int share =
      static_cast<int>(static_cast<long long>(budget_pages) * kept.newest_percent / 100);
  const int newest = share < 1 ? 1 : share;
  const int rest = budget_pages - newest;
  return {kept.first_pages < rest ? kept.first_pages : rest, newest};
}

}  // namespace quest
