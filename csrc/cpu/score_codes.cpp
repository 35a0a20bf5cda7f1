// Stage 2 for the score `codes`: estimate the share of the attention that every page holds.
//
// First the pages' masses, by query head: a task has kTaskGroups groups of one row and KV head. A
// lane is a token: its word of 16 channels is masked, not shifted, so that channel i appears
// multiplied by 2^bit(i), and the query is divided by as much beforehand, with the group's step
// multiplied in. Pages are weighed side by side, one in each lane. Then the scores: a task has a
// row and KV head.
#include "../codes.h"
#include "kernels.h"
#include "row_tasks.h"
#include "rows.h"
#include "vec.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kTaskGroups = 8;
constexpr int kTokenVectors = kRegisters / 8;  // with kMaxHeadTile, half the registers accumulate
constexpr int kMinPageTokens = 8;
constexpr int kMaxGroupPages = kGroupTokens / kMinPageTokens;
constexpr float kLowest = -0x1p126f;

static_assert(kGroupTokens % (kTokenVectors * kLanes) == 0 && kMaxGroupPages % kLanes == 0);

// The query heads of one KV head, as floats, and what a group makes of some of them.
struct Query {
  const float* heads;     // [group_size, head_size]: q * scale
  const float* unmasked;  // [group_size, head_size]: q * scale / 2^bit
  float* scaled;          // [kMaxHeadTile, head_size]: q * scale * step / 2^bit
  float* logits;          // [kMaxHeadTile, kGroupTokens]
};

constexpr int bit_of(int channel) { return 8 * (channel % 4) + 2 * (channel / 4); }

// Where masked codes lie, as factors: of channels `first` on, 2^-bit. The last channel is shifted.
Floats unmask(int first) {
  float factors[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int channel = first + lane;
    const uint32_t exponent = channel == kWordChannels - 1 ? 0 : bit_of(channel);
    factors[lane] = bit_cast<float>((127 - exponent) << 23);
  }
  return load(factors);
}

// `scale` is what makes logits of products: in base 2, unless a soft cap comes first.
template <class T>
Query load_query(const ScoreCodesParams& p, int row, int kv_head, float scale) {
  const int head_size = p.cache.head_size;
  const int64_t size = static_cast<int64_t>(p.group_size) * head_size;
  float* heads = static_cast<float*>(scratch(
      Scratch::kThread, (2 * size + kMaxHeadTile * (head_size + kGroupTokens)) * sizeof(float)));
  float* unmasked = heads + size;
  float* scaled = unmasked + size;
  for (int head = 0; head < p.group_size; ++head) {
    const T* query = static_cast<const T*>(p.query) + row * p.query_row_stride +
                     (kv_head * p.group_size + head) * p.query_head_stride;
    for (int d = 0; d < head_size; d += kLanes) {
      const Floats q = load(query + d) * scale;
      store_unaligned(heads + head * head_size + d, q);
      store_unaligned(unmasked + head * head_size + d, q * unmask(d % kWordChannels));
    }
  }
  return {heads, unmasked, scaled, scaled + kMaxHeadTile * head_size};
}

// Multiply a group's scales into kHeads query heads; `constants` are their products with offsets.
template <int kHeads, class T>
void scale_heads(const T* scales,  // [2, head_size] offset | step
                 const float* heads, const float* unmasked, int head_size, float* scaled,
                 float* constants) {
  Floats totals[kHeads] = {};
  for (int d = 0; d < head_size; d += kLanes) {
    const Floats offset = load(scales + d), step = load(scales + head_size + d);
    for (int head = 0; head < kHeads; ++head) {
      const int at = head * head_size + d;
      totals[head] += load(heads + at) * offset;
      store_unaligned(scaled + at, load(unmasked + at) * step);
    }
  }
  for (int head = 0; head < kHeads; ++head) constants[head] = sum(totals[head]);
}

// The logits of kHeads query heads with a group's tokens.
template <int kHeads>
void multiply(const uint32_t* words,  // [head_size / 16, kGroupTokens]
              const uint32_t* next,   // the same of a later group, to be fetched meanwhile
              const float* scaled, const float* constants, int head_size, float* logits) {
  for (int token = 0; token < kGroupTokens; token += kTokenVectors * kLanes) {
    Floats sums[kHeads][kTokenVectors];
    for (int head = 0; head < kHeads; ++head) {
      for (Floats& sum : sums[head]) sum = broadcast(constants[head]);
    }
    for (int channel = 0; channel < head_size; channel += kWordChannels) {
      const int64_t at = static_cast<int64_t>(channel / kWordChannels) * kGroupTokens + token;
      Uints word[kTokenVectors];
      for (int i = 0; i < kTokenVectors; ++i) {
        word[i] = load_unaligned<Uints>(words + at + i * kLanes);
        if (i * sizeof(Uints) % kLineBytes == 0) prefetch(next + at + i * kLanes);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kWordChannels; ++k) {
        Floats codes[kTokenVectors];
        for (int i = 0; i < kTokenVectors; ++i) {
          // The highest two bits would make a negative number.
          const Uints code =
              k == kWordChannels - 1 ? word[i] >> bit_of(k) : word[i] & (3u << bit_of(k));
          codes[i] = __builtin_convertvector(bit_cast<Ints>(code), Floats);
        }
        for (int head = 0; head < kHeads; ++head) {
          const float q = scaled[head * head_size + channel + k];
          for (int i = 0; i < kTokenVectors; ++i) sums[head][i] += codes[i] * q;
        }
      }
    }
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < kTokenVectors; ++i) {
        store_unaligned(logits + head * kGroupTokens + token + i * kLanes, sums[head][i]);
      }
    }
  }
}

// The logits of one query head with the keys of a group that is not full.
template <class T>
void multiply_keys(const T* keys, int row_size, int num_tokens, const float* query, int head_size,
                   float* logits) {
  for (int token = 0; token < num_tokens; ++token) {
    Floats total{};
    for (int d = 0; d < head_size; d += kLanes) {
      total += load(query + d) * load(keys + token * row_size + d);
    }
    logits[token] = sum(total);
  }
}

// The mass that a head's logits give each page, base 2. The logits are in base 2 too, unless a soft
// cap is to be applied.
void weigh_pages(float* logits,  // [kGroupTokens]
                 int num_tokens, int page_size, float soft_cap, float* masses) {
  if (soft_cap > 0) {
    for (int i = 0; i < num_tokens; i += kLanes) {
      store_unaligned(logits + i, tanh(load(logits + i) / soft_cap) * (soft_cap * kLog2e));
    }
  }
  for (int i = num_tokens; i < kGroupTokens; ++i) logits[i] = kLowest;
  // Of a page of fewer tokens than lanes, the other lanes weigh nothing.
  const int valid = min_of(page_size, kLanes);
  const auto lanes_from = [&](const float* from) {
    Floats lanes = broadcast(kLowest);
    memcpy(&lanes, from, valid * sizeof(float));
    return lanes;
  };
  const int num_pages = div_up(num_tokens, page_size);
  for (int first = 0; first < num_pages; first += kLanes) {  // a page in each lane
    const float* of_pages = logits + first * page_size;
    const int count = min_of(kLanes, kGroupTokens / page_size - first);
    Floats each[kLanes];
    for (int page = 0; page < kLanes; ++page) {
      each[page] = broadcast(kLowest);
      for (int i = 0; page < count && i < page_size; i += valid) {
        each[page] = max_of(each[page], lanes_from(of_pages + page * page_size + i));
      }
    }
    const Floats largest = max_each(each);
    for (int page = 0; page < kLanes; ++page) {
      each[page] = broadcast(1.0f / kLanes);
      if (page >= count) continue;
      each[page] = Floats{};
      for (int i = 0; i < page_size; i += valid) {
        each[page] += exp2_nonpositive(lanes_from(of_pages + page * page_size + i) - largest[page]);
      }
    }
    const Floats mass = largest + log2(sum_each(each));
    memcpy(masses + first, &mass, min_of(kLanes, num_pages - first) * sizeof(float));
  }
}

template <class T>
void weigh_groups(const ScoreCodesParams& p, int row, int kv_head, int begin, int end) {
  const KvCache& cache = p.cache;
  const int row_size = 2 * cache.head_size, page_size = cache.page_size;
  const int group_pages = kGroupTokens / page_size,
            block_groups = cache.block_tokens / kGroupTokens;
  const int seq_len = p.rows.seq_lens[row];
  const int32_t* block_table = p.rows.block_table + row * p.rows.block_table_stride;
  const auto block_of_group = [&](int group) {
    return static_cast<const T*>(cache.data) + kv_head * cache.head_stride +
           block_table[group / block_groups] * cache.block_stride;
  };
  const auto rows_of_group = [&](int group) {
    return block_of_group(group) +
           (cache.block_tokens + static_cast<int64_t>(group % block_groups) * kGroupRows) *
               row_size;
  };
  const auto masses_of = [&](int head, int group) {
    return p.masses.data + row * p.masses.row_stride +
           (kv_head * p.group_size + head) * p.masses.head_stride + group * group_pages;
  };
  const float to_base_2 = p.soft_cap > 0 ? 1.0f : kLog2e;
  const Query query = load_query<T>(p, row, kv_head, p.scale * to_base_2);
  const int end_full = min_of(end, seq_len / kGroupTokens);

  for (int group = begin; group < end_full; ++group) {
    const T* rows = rows_of_group(group);
    const T* next = group + 1 < end_full ? rows_of_group(group + 1) : rows;
    for_head_tiles(p.group_size, [&]<int kHeads>(int first) {
      float constants[kHeads];
      scale_heads<kHeads>(rows + kScalesRow * row_size, query.heads + first * cache.head_size,
                          query.unmasked + first * cache.head_size, cache.head_size, query.scaled,
                          constants);
      multiply<kHeads>(reinterpret_cast<const uint32_t*>(rows),
                       reinterpret_cast<const uint32_t*>(next), query.scaled, constants,
                       cache.head_size, query.logits);
      for (int i = 0; i < kHeads; ++i) {
        weigh_pages(query.logits + i * kGroupTokens, kGroupTokens, page_size, p.soft_cap,
                    masses_of(first + i, group));
      }
    });
  }
  if (end_full == end) return;
  // The row's last group is not full.
  const int group = end - 1, num_tokens = seq_len % kGroupTokens;
  const T* keys =
      block_of_group(group) + static_cast<int64_t>(group % block_groups) * kGroupTokens * row_size;
  for (int head = 0; head < p.group_size; ++head) {
    multiply_keys(keys, row_size, num_tokens, query.heads + head * cache.head_size, cache.head_size,
                  query.logits);
    weigh_pages(query.logits, num_tokens, page_size, p.soft_cap, masses_of(head, group));
  }
}

// The mass of all pages of a query head, base 2.
float total_of(const float* masses, int num_pages) {
  float largest = masses[0];
  for (int page = 1; page < num_pages; ++page) largest = max_of(largest, masses[page]);
  Floats weights{};
  for (int page = 0; page < num_pages; page += kLanes) {
    Floats lanes = broadcast(kLowest);
    memcpy(&lanes, masses + page, min_of(kLanes, num_pages - page) * sizeof(float));
    weights += exp2_nonpositive(lanes - largest);
  }
  return largest + log2(broadcast(sum(weights)))[0];
}

void score_pages(const ScoreCodesParams& p, int row, int kv_head) {
  const int seq_len = p.rows.seq_lens[row];
  const int num_pages = div_up(seq_len, p.cache.page_size);
  const int num_coded = seq_len / kGroupTokens * (kGroupTokens / p.cache.page_size);
  float* scores = p.scores + row * p.scores_row_stride + kv_head * p.scores_head_stride;
  for (int page = 0; page < num_coded; ++page) scores[page] = -__builtin_inff();
  for (int head = kv_head * p.group_size; head < (kv_head + 1) * p.group_size; ++head) {
    const float* masses = p.masses.data + row * p.masses.row_stride + head * p.masses.head_stride;
    const float total = total_of(masses, num_pages);
    for (int page = 0; page < num_coded; ++page) {
      scores[page] = max_of(scores[page], masses[page] - total);
    }
  }
  for (int page = num_coded; page < num_pages; ++page) scores[page] = score_without_codes(page);
}

// How many tasks a row is divided into: none if it fits its budget.
RowTasks tasks_of(const ScoreCodesParams& p, int (*chunks_of)(int seq_len)) {
  return RowTasks(p.rows.num_rows, [&](int row) -> int64_t {
    const int seq_len = p.rows.seq_lens[row];
    if (!over_budget(seq_len, p.rows.budget_pages[row], p.cache.page_size)) return 0;
    return static_cast<int64_t>(p.cache.num_kv_heads) * chunks_of(seq_len);
  });
}

}  // namespace

void score_codes(const ScoreCodesParams& p) {
  const RowTasks tasks =
      tasks_of(p, [](int seq_len) { return div_up(div_up(seq_len, kGroupTokens), kTaskGroups); });
  with_dtype(p.cache.dtype, [&]<class T>() {
    parallel_for(tasks.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowTask task = tasks[i];
        const int num_groups = div_up(p.rows.seq_lens[task.row], kGroupTokens);
        const int num_chunks = div_up(num_groups, kTaskGroups);
        const int first = task.index % num_chunks * kTaskGroups;
        weigh_groups<T>(p, task.row, task.index / num_chunks, first,
                        min_of(first + kTaskGroups, num_groups));
      }
    });
  });
  const RowTasks scores = tasks_of(p, [](int) { return 1; });
  parallel_for(scores.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) score_pages(p, scores[i].row, scores[i].index);
  });
}

}  // namespace QUEST_ISA
}  // namespace quest
