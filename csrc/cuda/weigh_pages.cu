// weigh_pages: what each page weighs for each query head, for the rows over their budget, and what
// each group of 128 tokens does.
//
// A warp has a group of one KV head. Codes are multiplied as 8-bit integers: a mask makes an
// operand's register of a word, or of a shifted one. The query, times the group's steps, is rounded
// to integers of 16 bits, each in two bytes, which are two columns of the product: so sums are
// exact, and the rounding is far below that of the codes. A group that is not full has no codes;
// all warps of a CTA weigh it by its keys.
//
// A warp's registers are loaded for the next group as soon as they have been used for this one.
//
// Bytes: 36 * head_size per group and KV head, read once; 4 per page and query head, written once.
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
constexpr int kUsualPageSize = 16;
constexpr float kMagic = 12582912.0f;    // 1.5 * 2^23: its low bits are an integer
constexpr float kMaxInteger = 32639.0f;  // its high byte and low byte, -128 to 127, are two bytes
constexpr float kSmallest = 1e-30f;      // products below it count as none

__device__ __forceinline__ int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

// sum[16 x 8] += a[16 x 32] * b[32 x 8]: bytes from 0 to 15 and integers. With lane l = 4 * r + c:
// a[0] has row r, columns 4c to 4c + 3; a[1] row r + 8; a[2], a[3] the same of columns 16 further
// on; b[0], b[1] have column r, rows 4c to 4c + 3 and 16 further on; sum as in Element<T>::mma.
__device__ __forceinline__ void mma_codes(int (&sum)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T, int kHeadSize, int kTiles>
class WeighPages {
 public:
  // A step multiplies 32 channels: 8 for each c, half a word's. Two steps take a word; where a
  // step is left over, a word serves two neighbouring lanes.
  static constexpr int kSteps = kHeadSize / 32, kWords = (kSteps + 1) / 2;

  // Of a query group, for lane 4 * r + c: query head 4 * tile + r / 2; the last head again where
  // there are too few.
  struct Shared {
    Vec query[kTiles][kSteps][kWarpSize];      // channels_of(step)
    float4 floats[kTiles][kSteps][kWarpSize];  // of these the first four, or the others for odd r
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
    int num_full = 0, num_tokens = 0;  // groups, and tokens behind them
    const T* next = rows_of_next();
    for (int number = begin_ - 1; number < end_; ++number) {
      look_up(number + 2);
      if (number < begin_) {
        load_group(next);
        next = rows_of_next();
        continue;
      }
      if (number == begin_ || number == segment.first + segment.count) {
        segment = schedule_.segment(number);
        const int seq_len = arrived(p_.rows.seq_lens[segment.row]);
        num_full = seq_len / kGroupTokens;
        num_tokens = seq_len % kGroupTokens;
        __syncthreads();  // before the query is overwritten
        load_query(segment);
        __syncthreads();
      }
      const int group = (number - segment.first) * kWarps + warp_;
      if (group < num_full) {
        next = weigh_group(segment, group, next);
      } else {
        load_group(next);
        next = rows_of_next();
      }
      if (num_tokens > 0 && num_full / kWarps == number - segment.first) {
        weigh_rest(segment, num_full, num_tokens);
      }
    }
  }

 private:
  // Where this lane's 8 channels of a step begin.
  __device__ int channels_of(int step) const {
    return shares_word(step) ? kWordChannels * (step / 2 * 4) + 8 * c_
                             : kWordChannels * (step / 2 * 4 + c_) + 8 * (step % 2);
  }
  static __device__ constexpr bool shares_word(int step) {
    return kSteps % 2 != 0 && step == kSteps - 1;
  }

  // Where this lane's words of a kind lie.
  __device__ int word_of(int i) const {
    return kSteps % 2 != 0 && i == kWords - 1 ? 4 * i + c_ / 2 : 4 * i + c_;
  }

  // Look up where a chunk's group lies.
  __device__ void look_up(int number) {
    has_next_ = false;
    if (number >= end_) return;
    if (number == begin_ || number == next_.first + next_.count) {
      next_ = schedule_.segment(number);
      num_full_of_next_ = p_.rows.seq_lens[next_.row] / kGroupTokens;
      next_table_ = p_.rows.block_table + next_.row * p_.rows.block_table_stride;
      next_heads_ = static_cast<const T*>(p_.cache.data) + next_.head * p_.cache.head_stride;
    }
    const int group = (number - next_.first) * kWarps + warp_;
    if (group >= num_full_of_next_) return;
    has_next_ = true;
    const int number_of_block = block_groups_.quotient(group);
    next_row_ =
        p_.cache.block_tokens + (group - number_of_block * block_groups_.divisor()) * kGroupRows;
    next_block_ = load_once(next_table_ + number_of_block);
  }

  // Wait for a loaded number, the same in all lanes, here and not where it is used: by then more
  // was loaded, and a wait would be for all of it.
  static __device__ int arrived(int x) { return __shfl_sync(kAllLanes, x, 0); }

  // The rows of the group that was looked up; null if there is none.
  __device__ const T* rows_of_next() const {
    const int block = arrived(next_block_);
    if (!has_next_) return nullptr;
    return next_heads_ + block * p_.cache.block_stride + next_row_ * 2 * kHeadSize;
  }

  __device__ void load_group(const T* rows) {
    if (rows == nullptr) return;
    load_scales(rows);
#pragma unroll
    for (int span = 0; span < kSpans; ++span) load_words(rows, span);
  }

  // The offsets of channels_of(step); the steps of four of them, as Shared::floats.
  __device__ void load_scales(const T* rows) {
    const T* const scales = rows + kScalesRow * 2 * kHeadSize + channels_of(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const T* const of_step = scales + (channels_of(step) - channels_of(0));
      offsets_[step] = load_once(of_step);
      steps_[step] = load_once(reinterpret_cast<const uint2*>(of_step + kHeadSize + 4 * (r_ % 2)));
    }
  }

  __device__ void load_words(const T* rows, int span) {
    const auto* const words = reinterpret_cast<const uint32_t*>(rows);
    const uint32_t* const first = words + (word_of(0) * kGroupTokens + 4 * r_);
    const uint32_t* const last = words + (word_of(kWords - 1) * kGroupTokens + 4 * r_);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t* const of_tokens = i < kWords - 1 ? first + 4 * i * kGroupTokens : last;
      words_[span][i] = load_once(of_tokens + span * kSpanTokens);
    }
  }

  __device__ void load_query(const Segment& segment) {
    for (int i = warp_; i < kTiles * kSteps; i += kWarps) {
      const int tile = i / kSteps, step = i % kSteps;
      const int head =
          segment.head * p_.group_size + min(tile * kTileHeads + r_ / 2, p_.group_size - 1);
      const T* query = static_cast<const T*>(p_.query) + segment.row * p_.query_row_stride +
                       head * p_.query_head_stride;
      const Vec vec = load_once(query + channels_of(step));
      shared_.query[tile][step][lane_] = vec;
      const float2 first = floats_of<T>(r_ % 2 == 0 ? vec.word[0] : vec.word[2]);
      const float2 second = floats_of<T>(r_ % 2 == 0 ? vec.word[1] : vec.word[3]);
      shared_.floats[tile][step][lane_] = make_float4(first.x, first.y, second.x, second.y);
    }
  }

  // Where the masses of a query head of the segment's KV head lie.
  __device__ float* masses_of(const Segment& segment, int head) const {
    return p_.masses.data + segment.row * p_.masses.row_stride +
           (segment.head * p_.group_size + head) * p_.masses.head_stride;
  }
  __device__ int first_page_of(int group) const { return group * kGroupTokens >> log2_page_size_; }

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

    // Sum up pages, and last the group. The next write to shared memory follows a barrier: a new
    // segment begins.
    const int num_halves = div_up(num_tokens, kHalfTokens);
    const int num_pages = div_up(num_tokens, p_.cache.page_size);
    for (int i = threadIdx.x; i < (num_pages + 1) * p_.group_size; i += kThreads) {
      const int head = i % p_.group_size, page = i / p_.group_size;
      const bool is_group = page == num_pages;
      const int halves = p_.cache.page_size / kHalfTokens;
      const int begin = is_group ? 0 : page * halves;
      const int end = is_group ? num_halves : min(begin + halves, num_halves);
      SoftmaxState state = no_tokens();
      for (int half = begin; half < end; ++half) {
        state = merge(state, shared_.halves[half][head]).state;
      }
      const int place = is_group ? p_.masses.first_group + group : first_page_of(group) + page;
      masses_of(segment, head)[place] = mass_of(state);
    }
  }

  // Weigh the pages of the group whose scales and codes were loaded, and load those of `next`, if
  // there is one. Returns the rows of the group that was looked up.
  __device__ const T* weigh_group(const Segment& segment, int group, const T* next) {
    // Multiply the query with the offsets, and with the steps.
    uint32_t integers[kTiles][kSteps][2];
    float base[kTiles], factor[kTiles];  // a logit is base + factor * integer
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      base[tile] = multiply_offsets(tile) * log2_scale_;
      const float of_column = scale_query(tile, integers[tile]);
      // This lane's sums are of query head 4 * tile + c, whose columns are 2c and 2c + 1.
      factor[tile] = __shfl_sync(kAllLanes, of_column, 8 * c_) * log2_scale_;
    }
    const T* const looked_up = rows_of_next();
    if (next != nullptr) load_scales(next);
    if (p_.cache.page_size == kUsualPageSize && p_.soft_cap == 0.0f) {
      weigh_spans<true>(segment, group, next, integers, base, factor);
    } else {
      weigh_spans<false>(segment, group, next, integers, base, factor);
    }
    return looked_up;
  }

  // Multiply spans of 32 tokens, and sum up pages and the group. `kIsUsual`: pages of 16 tokens,
  // and no soft cap.
  template <bool kIsUsual>
  __device__ __forceinline__ void weigh_spans(const Segment& segment, int group, const T* next,
                                              const uint32_t (&integers)[kTiles][kSteps][2],
                                              const float (&base)[kTiles],
                                              const float (&factor)[kTiles]) {
    const int page_size = kIsUsual ? kUsualPageSize : p_.cache.page_size;
    SoftmaxState states[kTiles][kSpans];  // of a span's pages, or of a part of one
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      float logits[kTiles][4];
      multiply_codes(words_[span], integers, logits);
      if (next != nullptr) load_words(next, span);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        states[tile][span] = weigh<kIsUsual>(logits[tile], base[tile], factor[tile], page_size);
      }
    }

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      // Bring the parts of long pages together, in the place of the first.
      static_assert(kSpans == 4);
      SoftmaxState(&parts)[kSpans] = states[tile];
      if (page_size > kSpanTokens) {
        parts[0] = sum_of<2>({parts[0], parts[1]});
        parts[2] = sum_of<2>({parts[2], parts[3]});
      }
      if (page_size > 2 * kSpanTokens) parts[0] = sum_of<2>({parts[0], parts[2]});

      // Lane 4 * r + c has the page of token 4 * r of each span.
      const int head = kTileHeads * tile + c_;
      float* const masses = masses_of(segment, head);
      float* const of_pages = masses + first_page_of(group) + (4 * r_ >> log2_page_size_);
      if ((4 * r_ & (page_size - 1)) == 0 && head < p_.group_size) {
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
          const int token = span * kSpanTokens;
          const int page = kIsUsual ? token / kUsualPageSize : token >> log2_page_size_;
          if ((token & (page_size - 1)) == 0) of_pages[page] = mass_of(parts[span]);
        }
      }

      SoftmaxState all = page_size <= kSpanTokens
                             ? sum_of<4>({parts[0], parts[1], parts[2], parts[3]})
                         : page_size <= 2 * kSpanTokens ? sum_of<2>({parts[0], parts[2]})
                                                        : parts[0];
#pragma unroll
      for (int apart = kHalfTokens; apart < kSpanTokens; apart *= 2) {
        if (page_size <= apart) {
          const float max_log2 = __shfl_xor_sync(kAllLanes, all.max_log2, apart);
          all = sum_of<2>({all, {max_log2, __shfl_xor_sync(kAllLanes, all.sum, apart)}});
        }
      }
      if (r_ == 0 && head < p_.group_size) masses[p_.masses.first_group + group] = mass_of(all);
    }
  }

  // All of the states, none of which is empty.
  template <int kCount>
  struct States {
    SoftmaxState state[kCount];
  };
  template <int kCount>
  static __device__ __forceinline__ SoftmaxState sum_of(const States<kCount>& states) {
    SoftmaxState all = {states.state[0].max_log2, 0.0f};
#pragma unroll
    for (const SoftmaxState& state : states.state)
      all.max_log2 = fmaxf(all.max_log2, state.max_log2);
#pragma unroll
    for (const SoftmaxState& state : states.state) {
      all.sum += state.sum * exp2_fast(state.max_log2 - all.max_log2);
    }
    return all;
  }

  // The weights of a span's tokens, summed over those of a page: lanes `apart` apart have tokens
  // that are as far apart, four each. A logit is base + factor * integer.
  template <bool kIsUsual>
  __device__ __forceinline__ SoftmaxState weigh(float (&logits)[4], float base, float factor,
                                                int page_size) const {
    if (!kIsUsual && p_.soft_cap > 0.0f) {
#pragma unroll
      for (float& logit : logits) logit = capped(base + factor * logit);
      base = 0.0f;
      factor = 1.0f;
    }
    float most = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
#pragma unroll
    for (int apart = 4; apart < kSpanTokens; apart *= 2) {
      if (page_size > apart) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, apart));
    }
    const float offset = -factor * most;
    float sum = 0.0f;
#pragma unroll
    for (const float logit : logits) sum += exp2_fast(factor * logit + offset);
#pragma unroll
    for (int apart = 4; apart < kSpanTokens; apart *= 2) {
      if (page_size > apart) sum += __shfl_xor_sync(kAllLanes, sum, apart);
    }
    return {base + factor * most, sum};
  }

  // q·offset of query head 4 * tile + c. A step's words lie in rows r and r + 8 of the matrix as
  // they were loaded. The product with words 0 and 2 of the query counts in rows r, that with words
  // 1 and 3 in rows r + 8.
  __device__ float multiply_offsets(int tile) const {
    float upper[4] = {}, lower[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto &q = shared_.query[tile][step][lane_].word, &x = offsets_[step].word;
      const MatrixA a = {{{x[0], x[2]}, {x[1], x[3]}}};
      Element<T>::mma(upper, a, q[0], q[2]);
      Element<T>::mma(lower, a, q[1], q[3]);
    }
    return upper[0] + lower[2];
  }

  // The query times the steps, as integers: of the column r, the high bytes of query head
  // 4 * tile + r / 2, or for odd r the low ones. Returns what an integer counts. The second four
  // channels of a step count four times as much, as their codes do (see multiply_codes).
  //
  // Two lanes with neighbouring r make both bytes of four channels each, and exchange them.
  __device__ float scale_query(int tile, uint32_t (&integers)[kSteps][2]) const {
    float products[kSteps][4], largest_of[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float4 q = shared_.floats[tile][step][lane_];
      const float2 first = floats_of<T>(steps_[step].x), second = floats_of<T>(steps_[step].y);
      products[step][0] = q.x * first.x;
      products[step][1] = q.y * first.y;
      products[step][2] = q.z * second.x;
      products[step][3] = q.w * second.y;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest_of[i] = fmaxf(largest_of[i], fabsf(products[step][i]));
      }
    }
    float largest = fmaxf(fmaxf(largest_of[0], largest_of[1]), fmaxf(largest_of[2], largest_of[3]));
#pragma unroll
    for (int apart = 1; apart <= 4; apart *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, apart));
    }
    const bool is_odd = r_ % 2 != 0;
    float per_one = largest > kSmallest ? __fdividef(kMaxInteger, largest) : 0.0f;
    if (is_odd) per_one *= 0.25f;

    // n = 256 * high + low, low from -128 to 127: of m = n + 128, high is the second byte, and low
    // the first one but for its highest bit.
    const uint32_t kept_bytes = is_odd ? 0x5410 : 0x7632, sent_bytes = is_odd ? 0x7632 : 0x5410;
    const uint32_t flips = is_odd ? 0x80808080 : 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m[i] = __float_as_uint(__fmaf_rn(products[step][i], per_one, kMagic + 128.0f));
      }
      constexpr uint32_t kLowBytesThenHighBytes = 0x5140;
      const uint32_t first = __byte_perm(m[0], m[1], kLowBytesThenHighBytes);
      const uint32_t second = __byte_perm(m[2], m[3], kLowBytesThenHighBytes);
      const uint32_t kept = __byte_perm(first, second, kept_bytes) ^ flips;
      const uint32_t sent = __byte_perm(first, second, sent_bytes);
      const uint32_t received = __shfl_xor_sync(kAllLanes, sent, 4) ^ flips;
      integers[step][0] = is_odd ? received : kept;
      integers[step][1] = is_odd ? kept : received;
    }
    return largest * (1.0f / kMaxInteger);
  }

  // The sums of a span's tokens, lane by lane: tokens 4r to 4r + 3, query heads 4 * tile + c.
  __device__ void multiply_codes(const Vec (&words)[kWords],
                                 const uint32_t (&integers)[kTiles][kSteps][2],
                                 float (&sums)[kTiles][4]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // of tokens: rows r and r + 8
      int sum[kTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int shift = 4 * (shares_word(step) ? c_ % 2 : step % 2);
        const uint32_t first = words[step / 2].word[2 * pair] >> shift;
        const uint32_t second = words[step / 2].word[2 * pair + 1] >> shift;
        // Codes, and codes times four: one shift less.
        constexpr uint32_t kOnce = 0x03030303, kFourTimes = 0x0c0c0c0c;
        const uint32_t codes[4] = {first & kOnce, second & kOnce, first & kFourTimes,
                                   second & kFourTimes};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_codes(sum[tile], codes, integers[tile][step]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          sums[tile][2 * pair + k] = __int2float_rn(sum[tile][2 * k] * 256 + sum[tile][2 * k + 1]);
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

  // Of the group that was looked up last.
  Segment next_;
  int num_full_of_next_ = 0;
  const int32_t* next_table_ = nullptr;
  const T* next_heads_ = nullptr;  // the KV head of all blocks
  bool has_next_ = false;
  int next_block_ = 0, next_row_ = 0;

  // Of the group that is weighed next.
  Vec words_[kSpans][kWords], offsets_[kSteps];
  uint2 steps_[kSteps];  // of four channels
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

template <typename T, int kHeadSize, int kTiles>
cudaError_t launch_weigh_pages(const ScoreCodesParams& params, cudaStream_t stream) {
  return launch(weigh_pages_kernel<T, kHeadSize, kTiles>,
                kResident<kHeadSize, kTiles> * num_multiprocessors(), kThreads,
                params.rows.num_rows * sizeof(int), stream, params,
                Divisor(params.cache.block_tokens / kGroupTokens));
}

}  // namespace

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

}  // namespace quest::cuda
