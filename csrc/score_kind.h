// What pages are scored by, the setting `score`: two bounds, in a row of their own, or codes. One
// kernel scores all bounds, by Σ max(q low, q high). For low, high = center ∓ spread this is
// q center + |q| spread.
#pragma once

namespace quest {

enum class ScoreKind {
  kMinMax,   // minimum, maximum: no key of the page exceeds its score
  kMeanStd,  // mean ∓ population standard deviation: an estimate
  kMidDev,   // middle of minimum and maximum ∓ mean absolute deviation from it: an estimate
  kCodes,    // no bounds, but keys in 2 bits: see codes.h
};

}  // namespace quest
