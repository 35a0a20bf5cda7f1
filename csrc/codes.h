// Keys in 2 bits, the score kind `codes`: where a group's codes and scales lie. What they are is
// `write_kv` in vllm_quest/ops.py.
//
// A group is kGroupTokens tokens of a block. Behind the block's keys and values, per KV head, group
// g has kGroupRows rows of 2 * head_size elements:
//
//     words   [head_size / 16, kGroupTokens] uint32: word [w, t] has channels 16 w to 16 w + 15 of
//             token t, channel 16 w + 4 j + b in bits 8 b + 2 j and the next. So a shift and a mask
//             give four neighbouring channels, a byte each. In a cache of 4-byte elements the words
//             fill half of the eight rows.
//     scales  [2, head_size] elements: offset | step, the last row.
#pragma once

#include <cstdint>

namespace quest {

constexpr int kGroupTokens = 128;
constexpr int kGroupRows = 9;
constexpr int kWordChannels = 16;
constexpr int kScalesRow = kGroupRows - 1;

// A page without codes outranks every estimate, and older ones: 2^102 * (2^23 + page).
#ifdef __CUDACC__
__host__ __device__
#endif
    static inline float score_without_codes(int page) {
  return 0x1p102f * static_cast<float>((1 << 23) + page);
}

}  // namespace quest
