// Stage 1, second part, for the score `codes`: code the groups whose last token was just stored.
//
// A task has some slots; it codes the groups of those that are a group's last. Sums are taken over
// the tokens in their order, and products are with powers of two, hence exact: so a compiler may
// fuse them with sums, and every machine stores the same bits.
#include "../codes.h"
#include "kernels.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

static_assert(kGroupTokens % kLanes == 0 && kWordChannels % kLanes == 0);

constexpr float kShare = 1.0f / kGroupTokens;

// Of kLanes channels: what a code counts from, and by.
struct Scales {
  Floats offset, step;
};

// Take the scales of a group's keys, and store them.
template <class T>
Scales write_scales(const T* keys,  // [kGroupTokens, 2 * head_size], kLanes of the first half
                    T* offsets, T* steps, int row_size) {
  Floats sum{}, deviations{};
  for (int token = 0; token < kGroupTokens; ++token) sum += load(keys + token * row_size);
  const Floats mean = sum * kShare;
  for (int token = 0; token < kGroupTokens; ++token) {
    const Floats distance = load(keys + token * row_size) - mean;
    deviations += distance < Floats{} ? -distance : distance;
  }
  const Floats deviation = deviations * kShare;
  const Floats step = deviation + deviation * 0.25f;
  for (int lane = 0; lane < kLanes; ++lane) store(steps + lane, step[lane]);
  const Floats stored_step = load(steps);
  const Floats offset = (mean - stored_step) - stored_step * 0.5f;
  for (int lane = 0; lane < kLanes; ++lane) store(offsets + lane, offset[lane]);
  return {load(offsets), stored_step};
}

// How many levels a key exceeds: 0 to 3 in every lane.
Ints code_of(Floats key, const Scales& scales) {
  const Floats above = key - scales.offset, half = scales.step * 0.5f;
  const Ints exceeded = (above > half) + (above > scales.step + half) +
                        (above > scales.step * 2.0f + half);  // a true lane is -1
  return -exceeded;
}

// Channel 4 j + b of a word lies in bits 8 b + 2 j and the next: from channel `first` on.
Ints bits_from(int first) {
  int32_t bits[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int channel = first + lane;
    bits[lane] = 8 * (channel % 4) + 2 * (channel / 4);
  }
  return load_unaligned<Ints>(bits);
}

// Code a group for one KV head.
template <class T>
void write_group(T* keys,  // [kGroupTokens, 2 * head_size], the first half of each row
                 T* rows,  // [kGroupRows, 2 * head_size]
                 int head_size) {
  constexpr int kParts = kWordChannels / kLanes;  // vectors of a word's channels
  const int row_size = 2 * head_size;
  char* words = reinterpret_cast<char*>(rows);
  T* offsets = rows + kScalesRow * row_size;
  for (int word = 0; word < head_size / kWordChannels; ++word) {
    const int channel = word * kWordChannels;
    Scales scales[kParts];
    Ints bits[kParts];
    for (int part = 0; part < kParts; ++part) {
      const int at = channel + part * kLanes;
      scales[part] = write_scales(keys + at, offsets + at, offsets + head_size + at, row_size);
      bits[part] = bits_from(part * kLanes);
    }
    for (int token = 0; token < kGroupTokens; token += kLanes) {
      Ints shifted[kLanes] = {};  // of each token, its channels' codes, each in its place
      for (int i = 0; i < kLanes; ++i) {
        for (int part = 0; part < kParts; ++part) {
          const Floats key = load(keys + (token + i) * row_size + channel + part * kLanes);
          shifted[i] += code_of(key, scales[part]) << bits[part];
        }
      }
      store_unaligned(words, sum_each(shifted));
      words += sizeof(Ints);
    }
  }
}

template <class T>
void write_groups(const KvCache& cache, int64_t slot) {
  const int64_t block = slot / cache.block_tokens;
  const int group = static_cast<int>(slot % cache.block_tokens) / kGroupTokens;
  const int row_size = 2 * cache.head_size;
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    T* rows = static_cast<T*>(cache.data) + block * cache.block_stride + head * cache.head_stride;
    write_group(rows + static_cast<int64_t>(group) * kGroupTokens * row_size,
                rows + static_cast<int64_t>(cache.block_tokens + group * kGroupRows) * row_size,
                cache.head_size);
  }
}

}  // namespace

void write_codes(const WriteKvParams& p) {
  // Slots count tokens over all blocks, which hold whole groups.
  const auto is_last_of_group = [&](int64_t i) {
    return p.slot_mapping[i] >= 0 && p.slot_mapping[i] % kGroupTokens == kGroupTokens - 1;
  };
  bool any = false;
  for (int64_t i = 0; i < p.num_slots && !any; ++i) any = is_last_of_group(i);
  if (!any) return;
  with_dtype(p.cache.dtype, [&]<class T>() {
    parallel_for(p.num_slots, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (is_last_of_group(i)) write_groups<T>(p.cache, p.slot_mapping[i]);
      }
    });
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
