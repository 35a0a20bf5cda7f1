// Splits rows of differing length into tasks of bounded size.
#pragma once

#include "vec.h"

namespace quest {
namespace QUEST_ISA {

struct RowTask {
  int row;
  int index;  // the task's number among those of its row
};

// Row r has tasks_of(r) tasks, and tasks are numbered row by row. Tasks depend on the rows alone,
// so results are independent of the number of threads.
class RowTasks {
 public:
  template <class F>
  RowTasks(int num_rows, const F& tasks_of)
      : num_rows_(num_rows),
        first_(static_cast<int64_t*>(scratch(Scratch::kPlan, sizeof(int64_t) * (num_rows + 1)))) {
    first_[0] = 0;
    for (int row = 0; row < num_rows; ++row) first_[row + 1] = first_[row] + tasks_of(row);
  }

  int64_t count() const { return first_[num_rows_]; }

  int64_t first_of(int row) const { return first_[row]; }

  RowTask operator[](int64_t task) const {
    int low = 0, high = num_rows_ - 1;
    while (low < high) {  // the last row whose first task is at or before this one
      const int middle = low + (high - low + 1) / 2;
      if (first_[middle] <= task) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return {low, static_cast<int>(task - first_[low])};
  }

 private:
  int num_rows_;
  int64_t* first_;  // [num_rows + 1]
};

}  // namespace QUEST_ISA
}  // namespace quest
