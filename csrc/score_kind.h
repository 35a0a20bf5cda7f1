// What a page's two rows of bounds hold, by the setting `score`. The kernel that scores is the same
// for all: Σ max(q low, q high), which for low, high = center ∓ spread is q center + |q| spread.
#pragma once

namespace quest {

enum class ScoreKind {
  kMinMax,   // minimum, maximum: no key of the page exceeds its score
  kMeanStd,  // mean ∓ population standard deviation: an estimate
  kMidDev,   // middle of minimum and maximum ∓ mean absolute deviation from it: an estimate
};

}  // namespace quest
