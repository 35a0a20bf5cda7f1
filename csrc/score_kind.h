// What a page's two rows of bounds hold, by the setting `score`. One kernel scores them all, by
// Σ max(q low, q high). For low, high = center ∓ spread this is q center + |q| spread.
#pragma once

namespace quest {

enum class ScoreKind {
  kMinMax,   // minimum, maximum: no key of the page exceeds its score
  kMeanStd,  // mean ∓ population standard deviation: an estimate
  kMidDev,   // middle of minimum and maximum ∓ mean absolute deviation from it: an estimate
};

}  // namespace quest
