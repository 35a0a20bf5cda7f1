// The constants that Python and the operators must agree on. Python reads them from the operator
// `contract(name)`, so each is written here alone.
#pragma once

#include <cstdint>

#include "codes.h"

namespace quest {

// The budget of a row that may read pages which another row writes in the same step. Every context
// fits it. cluster_decode waits for write_kv before it reads any page of the row. See
// cuda/DESIGN.md, "Decode begins beside the write".
constexpr int32_t kUnsettledPages = INT32_MAX - 1;

// Pages at a row's end that its own request may write in a step: its token, and those that it
// speculates. All pages before them are settled.
constexpr int32_t kGrowingPages = 16;

// Query heads per KV head, at most, on a GPU.
constexpr int32_t kMaxGroupSize = 16;

}  // namespace quest
