// Division by a number that the host knows: a product and a shift.
#pragma once

#include <cstdint>

namespace quest::cuda {

class Divisor {
 public:
  explicit Divisor(int divisor) : divisor_(divisor) {
    int log2 = 0;  // rounded up
    while ((int64_t{1} << log2) < divisor) ++log2;
    shift_ = 31 + log2;
    // At most 2^32 - 1. The quotient is exact for dividends below 2^31 (Granlund and Montgomery,
    // "Division by invariant integers using multiplication", 1994).
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }

  __device__ __forceinline__ int quotient(int dividend) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * multiplier_ >>
                            shift_);
  }

  __device__ __forceinline__ int divisor() const { return divisor_; }

 private:
  int divisor_;
  uint32_t multiplier_;
  int shift_;
};

}  // namespace quest::cuda
