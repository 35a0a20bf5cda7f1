// The state of an online softmax.
#pragma once

namespace quest {

// One query head's weights 2^(logit - max_log2) so far. Logits are in units of log2.
struct alignas(8) SoftmaxState {
  float max_log2;
  float sum;
};

}  // namespace quest
