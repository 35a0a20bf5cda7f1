// score_codes: the share of the attention that each page is estimated to hold, for the rows over
// their budget. A first kernel weighs the pages by query head, a second one scores them: it knows
// what all of a head's pages weigh.
//
// In the first, a warp has a group of 128 tokens for one KV head. Codes are multiplied as 8-bit
// integers: a shift and a mask make an operand's register of a word. The query, times the group's
// steps, is rounded to integers of some 13 bits, each in two bytes, which are two columns of the
// product: so sums are exact, and the rounding is far below that of the codes. A group that is not
// full has no codes; all warps of a CTA weigh it by its keys.
//
// Bytes: 36 * head_size per group and KV head, each read once; 4 per page and query head, which are
// written once and read twice, from L2.
#include <algorithm>

#include "device.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace quest::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileHeads = 4;    // query heads of a product: of 8 columns, two for each
constexpr int kSpanTokens = 32;  // that a load brings a warp, 4 to a lane
constexpr int kSpans = kGroupTokens / kSpanTokens;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its low bits are an integer
constexpr int kMagicBits = 0x4b400000;
constexpr float kSmallest = 1e-30f;  // products below it count as none

__device__ __forceinline__ int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

__device__ __forceinline__ float mass_of(const SoftmaxState& state) {
  return state.max_log2 + __log2f(state.sum);
}

// sum[16 x 8] += a[16 x 32] * b[32 x 8]: bytes 0 to 3 and integers. With lane l = 4 * r + c: a[0]
// has row r, columns 4c to 4c + 3; a[1] row r + 8; a[2], a[3] the same of columns 16 further on;
// b0, b1 have column r, rows 4c to 4c + 3 and 16 further on; sum as in Element<T>::mma.
__device__ __forceinline__ void mma_codes(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T, int kHeadSize, int kTiles>
class WeighPages {
 public:
  // A step multiplies 32 channels: 8 for each c, half a word's. Two steps take a word; where a
  // step is left over, a word serves two neighbouring lanes.
  static constexpr int kSteps = kHeadSize / 32, kWords = (kSteps + 1) / 2;
  // Sums of 3 * kHeadSize such integers fit the low bits of kMagic.
  static constexpr int kMaxInteger = (1 << 22) / (3 * kHeadSize) - 1;

  // Of a query group, for lane 4 * r + c: channels_of(step) of query head 4 * tile + r / 2; the
  // last head again where there are too few.
  struct Shared {
    Vec query[kTiles][kSteps][kWarpSize];
    SoftmaxState halves[kGroupTokens / kHalfTokens][kTiles * kTileHeads];  // of a group not full
  };

  __device__ WeighPages(const ScoreCodesParams& p, const Divisor& block_groups, Shared& shared,
                        const Schedule& schedule)
      : p_(p),
        block_groups_(block_groups),
        shared_(shared),
        schedule_(schedule),
        log2_page_size_(log2_of(p.cache.page_size)),
        begin_(schedule.begin(blockIdx.x)),
        end_(schedule.begin(blockIdx.x + 1)),
        lane_(threadIdx.x % kWarpSize),
        warp_(threadIdx.x / kWarpSize),
        r_(lane_ / 4),
        c_(lane_ % 4),
        log2_scale_(p.scale * kLog2E) {
    look_up(begin_);
  }

  static __device__ int chunks_of(int seq_len) {
    return div_up(div_up(seq_len, kGroupTokens), kWarps);
  }

  // Weigh the pages of a CTA's share of all chunks: a group for each warp.
  __device__ void run() {
    Segment segment;
    for (int number = begin_; number < end_; ++number) {
      if (number == begin_ || number == segment.first + segment.count) {
        segment = schedule_.segment(number);
        __syncthreads();  // before the query is overwritten
        load_query(segment);
        __syncthreads();
      }
      const int group = (number - segment.first) * kWarps + warp_;
      const int block = next_block_, group_of_block = next_group_of_block_;
      const int num_full = p_.rows.seq_lens[segment.row] / kGroupTokens;
      look_up(number + 1);
      if (group < num_full) weigh_group(segment, group, block, group_of_block);
      const int num_tokens = p_.rows.seq_lens[segment.row] % kGroupTokens;
      if (num_tokens > 0 && num_full / kWarps == number - segment.first) {
        weigh_rest(segment, num_full, num_tokens);
      }
    }
  }

 private:
  // Where this lane's 8 channels of a step begin.
  __device__ int channels_of(int step) const {
    return kSteps % 2 == 0 || step < kSteps - 1
               ? kWordChannels * (step / 2 * 4 + c_) + 8 * (step % 2)
               : kWordChannels * (step / 2 * 4) + 8 * c_;
  }

  // Where this lane's words of a kind lie.
  __device__ int word_of(int i) const {
    return kSteps % 2 != 0 && i == kWords - 1 ? 4 * i + c_ / 2 : 4 * i + c_;
  }

  // Look up where a chunk's group lies.
  __device__ void look_up(int number) {
    if (number >= end_) return;
    if (number == begin_ || number == next_.first + next_.count) next_ = schedule_.segment(number);
    const int group = (number - next_.first) * kWarps + warp_;
    if (group < p_.rows.seq_lens[next_.row] / kGroupTokens) {
      const int number_of_block = block_groups_.quotient(group);
      next_group_of_block_ = group - number_of_block * block_groups_.divisor();
      next_block_ =
          load_once(p_.rows.block_table + next_.row * p_.rows.block_table_stride + number_of_block);
    }
  }

  __device__ void load_query(const Segment& segment) {
    for (int i = warp_; i < kTiles * kSteps; i += kWarps) {
      const int tile = i / kSteps, step = i % kSteps;
      const int head =
          segment.head * p_.group_size + min(tile * kTileHeads + r_ / 2, p_.group_size - 1);
      const T* query = static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                       head * p_.query_head_stride;
      shared_.query[tile][step][lane_] = load_once(query + channels_of(step));
    }
  }

  // Where the masses of a group's pages lie, for a query head of the segment's KV head.
  __device__ float* masses_of(const Segment& segment, int head, int group) const {
    return p_.masses + segment.row * p_.masses_row_stride +
           (segment.head * p_.group_size + head) * p_.masses_head_stride +
           (group * kGroupTokens >> log2_page_size_);
  }

  // Weigh the pages of a group that is not full: 16 tokens for each warp. Called by all warps, with
  // the segment's last chunk.
  __device__ void weigh_rest(const Segment& segment, int group, int num_tokens) {
    static_assert(kWarps * kTileTokens == kGroupTokens);
    const int first = kTileTokens * warp_;
    if (first < num_tokens) {
      // Load the keys of tokens r and r + 8; the last one in the place of those that follow it.
      const int number = block_groups_.quotient(group);
      const int block =
          load_once(p_.rows.block_table + segment.row * p_.rows.block_table_stride + number);
      const T* keys = static_cast<const T*>(p_.cache.data) + block * p_.cache.block_stride +
                      segment.head * p_.cache.head_stride +
                      (group - number * block_groups_.divisor()) * kGroupTokens * 2 * kHeadSize;
      Vec of_keys[2][kSteps];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = min(first + kHalfTokens * half + r_, num_tokens - 1);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          of_keys[half][step] = load_once(keys + token * 2 * kHeadSize + channels_of(step));
        }
      }

      // Multiply; the sums of row r are of query head 4 * tile + c in both columns.
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float sum[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const Vec q = shared_.query[tile][step][lane_];
          const auto &low = of_keys[0][step].word, &high = of_keys[1][step].word;
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            const MatrixA a = {{{low[w], low[w + 1]}, {high[w], high[w + 1]}}};
            Element<T>::mma(sum, a, q.word[w], q.word[w + 1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool exists = first + kHalfTokens * half + r_ < num_tokens;
          float logit = sum[2 * half] * log2_scale_;
          if (p_.soft_cap > 0.0f) logit = capped(logit);
          if (!exists) logit = -INFINITY;
          float most = logit;
          for (int apart = 4; apart < kWarpSize; apart *= 2) {
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, apart));
          }
          float weight = exists ? exp2_fast(logit - most) : 0.0f;
          for (int apart = 4; apart < kWarpSize; apart *= 2) {
            weight += __shfl_xor_sync(kAllLanes, weight, apart);
          }
          if (r_ == 0) shared_.halves[2 * warp_ + half][kTileHeads * tile + c_] = {most, weight};
        }
      }
    }
    __syncthreads();

    // Sum up pages. The next write to shared memory follows a barrier: a new segment begins.
    const int halves = p_.cache.page_size / kHalfTokens;
    const int num_pages = div_up(num_tokens, p_.cache.page_size);
    for (int i = threadIdx.x; i < num_pages * p_.group_size; i += kThreads) {
      const int page = i % num_pages, head = i / num_pages;
      const int end = min((page + 1) * halves, div_up(num_tokens, kHalfTokens));
      SoftmaxState state = no_tokens();
      for (int half = page * halves; half < end; ++half) {
        state = merge(state, shared_.halves[half][head]).state;
      }
      masses_of(segment, head, group)[page] = mass_of(state);
    }
  }

  __device__ void weigh_group(const Segment& segment, int group, int block, int group_of_block) {
    // Load scales and codes, all at once.
    const T* rows = static_cast<const T*>(p_.cache.data) + block * p_.cache.block_stride +
                    segment.head * p_.cache.head_stride +
                    (p_.cache.block_tokens + group_of_block * kGroupRows) * 2 * kHeadSize;
    const T* scales = rows + kScalesRow * 2 * kHeadSize;
    Vec offsets[kSteps], steps[kSteps], words[kSpans][kWords];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      offsets[step] = load_once(scales + channels_of(step));
      steps[step] = load_once(scales + kHeadSize + channels_of(step));
    }
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[span][i] = load_once(reinterpret_cast<const uint32_t*>(rows) +
                                   word_of(i) * kGroupTokens + span * kSpanTokens + 4 * r_);
      }
    }

    // Multiply the query with the offsets, and with the steps.
    uint32_t integers[kTiles][kSteps][2];
    float base[kTiles], factor[kTiles];  // a logit is base + factor * integer
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      base[tile] = multiply_offsets(tile, offsets) * log2_scale_;
      const float of_column = scale_query(tile, steps, integers[tile]);
      // This lane's sums are of query head 4 * tile + c, whose columns are 2c and 2c + 1.
      factor[tile] = __shfl_sync(kAllLanes, of_column, 8 * c_) * log2_scale_;
    }

    // Multiply spans of 32 tokens, and sum up pages.
    const int page_size = p_.cache.page_size;
    SoftmaxState begun[kTiles];  // of a page that takes several spans
#pragma unroll
    for (SoftmaxState& state : begun) state = no_tokens();
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      float logits[kTiles][4];
      multiply_codes(words[span], integers, logits);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (float& logit : logits[tile]) logit = base[tile] + factor[tile] * logit;
        if (p_.soft_cap > 0.0f) {
#pragma unroll
          for (float& logit : logits[tile]) logit = capped(logit);
        }
        SoftmaxState state = weigh(logits[tile], page_size);
        if (page_size > kSpanTokens) {
          state = begun[tile] = merge(begun[tile], state).state;
          if ((span + 1) * kSpanTokens % page_size != 0) continue;
          begun[tile] = no_tokens();
        }
        const int head = kTileHeads * tile + c_;
        const bool is_first = (4 * r_ & (page_size - 1)) == 0;
        if (is_first && head < p_.group_size) {
          masses_of(segment, head, group)[(span * kSpanTokens + 4 * r_) >> log2_page_size_] =
              mass_of(state);
        }
      }
    }
  }

  // The weights of a span's tokens, summed over those of a page: lanes 4 * r apart have four tokens
  // each.
  __device__ SoftmaxState weigh(const float (&logits)[4], int page_size) const {
    float most = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 4));
    if (page_size > 8) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 8));
    if (page_size > 16) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 16));
    float sum = 0.0f;
#pragma unroll
    for (const float logit : logits) sum += exp2_fast(logit - most);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    if (page_size > 8) sum += __shfl_xor_sync(kAllLanes, sum, 8);
    if (page_size > 16) sum += __shfl_xor_sync(kAllLanes, sum, 16);
    return {most, sum};
  }

  // q·offset of query head 4 * tile + c.
  __device__ float multiply_offsets(int tile, const Vec (&offsets)[kSteps]) const {
    float sum[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Vec q = shared_.query[tile][step][lane_];
      const auto& x = offsets[step].word;  // all rows alike
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        const MatrixA a = {{{x[w], x[w + 1]}, {x[w], x[w + 1]}}};
        Element<T>::mma(sum, a, q.word[w], q.word[w + 1]);
      }
    }
    return sum[0];
  }

  // The query times the steps, as integers: of the column r, the high bytes of query head
  // 4 * tile + r / 2, or the low ones. Returns what an integer counts.
  __device__ float scale_query(int tile, const Vec (&steps)[kSteps],
                               uint32_t (&integers)[kSteps][2]) const {
    float products[kSteps][Vec::kElements], largest = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Vec q = shared_.query[tile][step][lane_];
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) {
        products[step][i] = static_cast<float>(reinterpret_cast<const T*>(&q)[i]) *
                            static_cast<float>(reinterpret_cast<const T*>(&steps[step])[i]);
        largest = fmaxf(largest, fabsf(products[step][i]));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float per_one = largest > kSmallest ? __fdividef(kMaxInteger, largest) : 0.0f;

    // n = 256 * high + low, low from -128 to 127: high is the second byte of n + 128.
    const bool is_high = r_ % 2 == 0;
    const float magic = is_high ? kMagic + 128.0f : kMagic;
    const uint32_t two_bytes = is_high ? 0x0051 : 0x0040;  // of two integers
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t n[Vec::kElements];
#pragma unroll
      for (int i = 0; i < Vec::kElements; ++i) {
        n[i] = __float_as_uint(__fmaf_rn(products[step][i], per_one, magic));
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        integers[step][k] = pack_low(__byte_perm(n[4 * k], n[4 * k + 1], two_bytes),
                                     __byte_perm(n[4 * k + 2], n[4 * k + 3], two_bytes));
      }
    }
    return largest * (1.0f / kMaxInteger);
  }

  // The sums of a span's tokens, lane by lane: tokens 4r to 4r + 3, query heads 4 * tile + c.
  __device__ void multiply_codes(const Vec (&words)[kWords],
                                 const uint32_t (&integers)[kTiles][kSteps][2],
                                 float (&sums)[kTiles][4]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // of tokens: rows r and r + 8
      int sum[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        sum[tile][0] = sum[tile][2] = 0;
        sum[tile][1] = sum[tile][3] = kMagicBits;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t first = words[step / 2].word[2 * pair],
                 second = words[step / 2].word[2 * pair + 1];
        const bool is_shared = kSteps % 2 != 0 && step == kSteps - 1;
        const int shift = 4 * (is_shared ? c_ % 2 : step % 2);
        first >>= shift;
        second >>= shift;
        constexpr uint32_t kMask = 0x03030303;
        const uint32_t codes[4] = {first & kMask, second & kMask, first >> 2 & kMask,
                                   second >> 2 & kMask};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_codes(sum[tile], codes, integers[tile][step][0], integers[tile][step][1]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int bits = sum[tile][2 * k] * 256 + sum[tile][2 * k + 1];
          sums[tile][2 * pair + k] = __int_as_float(bits) - kMagic;
        }
      }
    }
  }

  // The soft cap of a logit, both in units of log2.
  __device__ float capped(float logit) const {
    const float y = exp2_fast(logit * __fdividef(2.0f, p_.soft_cap));
    return p_.soft_cap * kLog2E * (1.0f - __fdividef(2.0f, 1.0f + y));
  }

  const ScoreCodesParams& p_;
  const Divisor& block_groups_;
  Shared& shared_;
  const Schedule& schedule_;
  const int log2_page_size_;
  const int begin_, end_;
  const int lane_, warp_, r_, c_;
  const float log2_scale_;

  Segment next_;  // of the group to be weighed next
  int next_block_ = 0, next_group_of_block_ = 0;
};

// Registers of a thread: 128 where two CTAs share a multiprocessor, else 255.
template <int kHeadSize, int kTiles>
constexpr int kResident = kHeadSize <= 128 && kTiles <= 2 ? 2 : 1;

template <typename T, int kHeadSize, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident<kHeadSize, kTiles>)
    weigh_pages_kernel(const __grid_constant__ ScoreCodesParams p,
                       const __grid_constant__ Divisor block_groups) {
  // grid: [CTAs that the GPU holds]; a CTA weighs its share of all chunks, a warp groups of them.
  using WeighPages = quest::cuda::WeighPages<T, kHeadSize, kTiles>;
  __shared__ typename WeighPages::Shared shared;
  extern __shared__ int row_end[];  // [num_rows]

  const Schedule schedule = Schedule::build<kThreads>(
      gridDim.x, p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
        const int seq_len = p.rows.seq_lens[row];
        return over_budget(seq_len, p.rows.budget_pages[row], p.cache.page_size)
                   ? WeighPages::chunks_of(seq_len)
                   : 0;
      });
  WeighPages weigh(p, block_groups, shared, schedule);
  wait_for_previous_kernel();
  release_next_kernel();
  weigh.run();
}

constexpr int kScoreThreads = 512, kScoreWarps = kScoreThreads / kWarpSize;
constexpr int kMaxGroup = 16;      // query heads
constexpr int kLoadsInFlight = 8;  // of a thread
static_assert(kMaxGroup <= kScoreWarps);

// Not a template: masses have no dtype.
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_masses_kernel(const __grid_constant__ ScoreCodesParams p) {
  // grid: [CTAs that the GPU holds]; a CTA scores its share of the (row, KV head) pairs.
  extern __shared__ int row_end[];  // [num_rows]
  __shared__ SoftmaxState of_warps[kScoreWarps];
  __shared__ float totals[kMaxGroup];
  const int page_size = p.cache.page_size;
  const Schedule schedule = Schedule::build<kScoreThreads>(
      gridDim.x, p.rows.num_rows, p.cache.num_kv_heads, row_end, [&](int row) {
        return over_budget(p.rows.seq_lens[row], p.rows.budget_pages[row], page_size) ? 1 : 0;
      });
  const int begin = schedule.begin(blockIdx.x), end = schedule.begin(blockIdx.x + 1);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps_per_head = kScoreWarps / p.group_size;
  wait_for_previous_kernel();
  release_next_kernel();

  for (int pair = begin; pair < end; ++pair) {
    const Segment segment = schedule.segment(pair);
    const int seq_len = p.rows.seq_lens[segment.row];
    const int num_pages = div_up(seq_len, page_size);
    const int num_coded = seq_len / kGroupTokens * (kGroupTokens / page_size);
    const float* masses = p.masses + segment.row * p.masses_row_stride +
                          segment.head * p.group_size * p.masses_head_stride;
    float* scores =
        p.scores + segment.row * p.scores_row_stride + segment.head * p.scores_head_stride;

    // Sum up all pages of each query head, some warps a head.
    const int head = warp / warps_per_head;
    SoftmaxState state = no_tokens();
    if (head < p.group_size) {
      const float* of_head = masses + head * p.masses_head_stride;
      const int apart = warps_per_head * kWarpSize;
      for (int first = warp % warps_per_head * kWarpSize + lane; first < num_pages;
           first += kLoadsInFlight * apart) {
        float mass[kLoadsInFlight], max_log2 = state.max_log2;
#pragma unroll
        for (int k = 0; k < kLoadsInFlight; ++k) {
          const int page = first + k * apart;
          mass[k] = page < num_pages ? load_once(of_head + page) : -INFINITY;
        }
#pragma unroll
        for (const float m : mass) max_log2 = fmaxf(max_log2, m);
        state = {max_log2, state.sum * rescale(state.max_log2, max_log2)};
#pragma unroll
        for (const float m : mass) state.sum += exp2_fast(m - max_log2);
      }
    }
    for (int apart = 1; apart < kWarpSize; apart *= 2) {
      const float max_log2 = __shfl_xor_sync(kAllLanes, state.max_log2, apart);
      state = merge(state, {max_log2, __shfl_xor_sync(kAllLanes, state.sum, apart)}).state;
    }
    if (lane == 0) of_warps[warp] = state;
    __syncthreads();
    if (threadIdx.x < p.group_size) {
      SoftmaxState all = no_tokens();
      for (int i = 0; i < warps_per_head; ++i) {
        all = merge(all, of_warps[threadIdx.x * warps_per_head + i]).state;
      }
      totals[threadIdx.x] = mass_of(all);
    }
    __syncthreads();

    // Score each page by the query head that it means most to.
    for (int page = threadIdx.x; page < num_pages; page += kScoreThreads) {
      float score = -INFINITY;
      for (int i = 0; i < p.group_size; ++i) {
        score = fmaxf(score, load_once(masses + i * p.masses_head_stride + page) - totals[i]);
      }
      scores[page] = page < num_coded ? score : score_without_codes(page);
    }
  }
}

template <typename T, int kHeadSize, int kTiles>
cudaError_t launch_weigh_pages(const ScoreCodesParams& params, cudaStream_t stream) {
  return launch(weigh_pages_kernel<T, kHeadSize, kTiles>,
                kResident<kHeadSize, kTiles> * num_multiprocessors(), kThreads,
                params.rows.num_rows * sizeof(int), stream, params,
                Divisor(params.cache.block_tokens / kGroupTokens));
}

cudaError_t weigh_pages(const ScoreCodesParams& params, cudaStream_t stream) {
  return for_shape(params.cache, 1, [&](auto shape) {
    using S = decltype(shape);
    using T = typename S::Type;
    constexpr int kHeadSize = S::kHeadSize;
    if (params.group_size <= kTileHeads) return launch_weigh_pages<T, kHeadSize, 1>(params, stream);
    if (params.group_size <= 2 * kTileHeads) {
      return launch_weigh_pages<T, kHeadSize, 2>(params, stream);
    }
    return launch_weigh_pages<T, kHeadSize, 4>(params, stream);
  });
}

}  // namespace

cudaError_t score_codes(const ScoreCodesParams& params, cudaStream_t stream) {
  const cudaError_t error = weigh_pages(params, stream);
  if (error != cudaSuccess) return error;
  const int ctas =
      std::min(params.rows.num_rows * params.cache.num_kv_heads, 2 * num_multiprocessors());
  return launch(score_masses_kernel, ctas, kScoreThreads, params.rows.num_rows * sizeof(int),
                stream, params);
}

}  // namespace quest::cuda
