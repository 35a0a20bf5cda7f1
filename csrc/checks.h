// What every operator demands of its arguments, on CPU and CUDA alike, and the sizes found on the
// way. A failed check says: operator, heading (device, dtype, layout, shape), what was expected,
// what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "codes.h"
#include "counters.h"
#include "kept.h"
#include "params.h"
#include "score_kind.h"

#define QUEST_CHECK(condition, op, heading, ...) \
  STD_TORCH_CHECK(condition, "vllm_quest::", op, ": " heading ": ", __VA_ARGS__)

namespace quest {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Device { kCpu, kCuda };

// The named sizes of `vllm_quest/ops.py`; those that an operator has no use for stay 0.
struct Sizes {
  int64_t num_rows = 0;
  int64_t num_slots = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_size = 0;
  int64_t num_blocks = 0;
  int64_t block_tokens = 0;
  int64_t page_size = 0;
  int64_t max_blocks = 0;
  int64_t max_pages = 0;
  int64_t max_selected = 0;

  int group_size() const { return static_cast<int>(num_heads / num_kv_heads); }
};

struct Arg {
  const char* name;
  const Tensor& tensor;
};

template <class Values>
std::string join(const Values& values) {
  std::string text = "[";
  for (int64_t value : values) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  }
  return text + "]";
}

// The dtypes of a KV cache, beside 16 bits.
inline ScalarType other_cache_dtype(Device device) {
  return device == Device::kCpu ? ScalarType::Float : ScalarType::Float8_e4m3fn;
}

inline bool is_fp8(const Tensor& kv_cache) {
  return kv_cache.scalar_type() == ScalarType::Float8_e4m3fn;
}

// The dtype of keys, values, queries and outputs outside of the cache.
inline ScalarType model_dtype(const Tensor& kv_cache) {
  return is_fp8(kv_cache) ? ScalarType::BFloat16 : kv_cache.scalar_type();
}

class Checks {
 public:
  Checks(const char* op, Device device) : op_(op), device_(device) {}

  void device(std::initializer_list<Arg> args) const {
    const Arg& first = *args.begin();
    for (const Arg& arg : args) {
      const bool on_kind = device_ == Device::kCpu ? arg.tensor.is_cpu() : arg.tensor.is_cuda();
      QUEST_CHECK(on_kind, op_, "device", arg.name, " must be on the ",
                  device_ == Device::kCpu ? "CPU" : "GPU", " as ", first.name, " is");
      const auto index = arg.tensor.get_device_index();
      QUEST_CHECK(index == first.tensor.get_device_index(), op_, "device", arg.name,
                  " must be on device ", first.tensor.get_device_index(), " as ", first.name,
                  " is, got device ", index);
    }
  }

  void dtype(const Arg& arg, ScalarType expected) const {
    const ScalarType found = arg.tensor.scalar_type();
    QUEST_CHECK(found == expected, op_, "dtype", arg.name, " must be ",
                torch::headeronly::toString(expected), ", got ",
                torch::headeronly::toString(found));
  }

  void dtypes(std::initializer_list<Arg> args, ScalarType expected) const {
    for (const Arg& arg : args) dtype(arg, expected);
  }

  // `expected` sizes; -1 accepts any.
  void shape(const Arg& arg, std::initializer_list<int64_t> expected) const {
    const auto sizes = arg.tensor.sizes();
    bool same = sizes.size() == expected.size();
    for (size_t dim = 0; same && dim < expected.size(); ++dim) {
      const int64_t size = expected.begin()[dim];
      same = size == -1 || size == sizes[dim];
    }
    QUEST_CHECK(same, op_, "shape", arg.name, " must be ", join(expected), " (-1: any), got ",
                join(sizes));
  }

  void inner_contiguous(const Arg& arg) const {
    const int64_t last = arg.tensor.dim() - 1;
    QUEST_CHECK(arg.tensor.size(last) <= 1 || arg.tensor.stride(last) == 1, op_, "layout", arg.name,
                " must be contiguous in its last dimension, got strides ",
                join(arg.tensor.strides()));
  }

  // Fills in the sizes that the cache tells.
  void cache(const Tensor& kv_cache, int64_t page_size, ScoreKind kind, Sizes& sizes) const {
    const ScalarType dtype = kv_cache.scalar_type();
    const ScalarType other = other_cache_dtype(device_);
    QUEST_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == other, op_,
                "dtype", "kv_cache must be BFloat16, Half or ", torch::headeronly::toString(other),
                ", got ", torch::headeronly::toString(dtype));
    shape({"kv_cache", kv_cache}, {-1, -1, -1, -1});
    const int64_t block_rows = kv_cache.size(2), row_size = kv_cache.size(3);
    QUEST_CHECK(kv_cache.stride(3) == 1 && kv_cache.stride(2) == row_size, op_, "layout",
                "kv_cache must be contiguous in its two inner dimensions: strides [any, any, ",
                row_size, ", 1], got ", join(kv_cache.strides()));
    QUEST_CHECK(page_size > 0 && page_size % 8 == 0, op_, "shape",
                "page_size must be a positive multiple of 8, got ", page_size);
    const bool is_coded = kind == ScoreKind::kCodes;
    QUEST_CHECK(!(is_coded && is_fp8(kv_cache)), op_, "dtype",
                "kv_cache must have 16 bits or more for the score codes, got ",
                torch::headeronly::toString(dtype));
    QUEST_CHECK(!is_coded || kGroupTokens % page_size == 0, op_, "shape", "page_size must divide ",
                kGroupTokens, ", the tokens of a group of codes, got ", page_size);
    // A block consists of whole units: a page with its bounds, or a group with its codes.
    const int64_t unit_tokens = is_coded ? kGroupTokens : page_size;
    const int64_t unit_rows = unit_tokens + (is_coded ? kGroupRows : 1);
    QUEST_CHECK(block_rows > 0 && block_rows % unit_rows == 0, op_, "shape", "kv_cache must hold ",
                unit_rows, " rows per ", unit_tokens,
                " tokens (dimension 2 a multiple of it), got ", join(kv_cache.sizes()));
    QUEST_CHECK(row_size > 0 && row_size % 32 == 0, op_, "shape",
                "head_size (half of kv_cache's last dimension) must be a multiple of 16, got ",
                join(kv_cache.sizes()));
    sizes.num_blocks = kv_cache.size(0);
    sizes.num_kv_heads = kv_cache.size(1);
    sizes.block_tokens = block_rows / unit_rows * unit_tokens;
    sizes.head_size = row_size / 2;
    sizes.page_size = page_size;
  }

  // Fills in the sizes that the decode rows' own arguments tell.
  void rows(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
            const Tensor& seq_lens, const Tensor& budget_pages, Sizes& sizes) const {
    dtype({"query", query}, model_dtype(kv_cache));
    shape({"query", query}, {-1, -1, sizes.head_size});
    inner_contiguous({"query", query});
    sizes.num_rows = query.size(0);
    sizes.num_heads = query.size(1);
    QUEST_CHECK(
        sizes.num_kv_heads > 0 && sizes.num_heads > 0 && sizes.num_heads % sizes.num_kv_heads == 0,
        op_, "shape", "query's heads must be a multiple of the cache's ", sizes.num_kv_heads,
        " KV heads, got ", sizes.num_heads);
    dtypes({{"block_table", block_table}}, ScalarType::Int);
    shape({"block_table", block_table}, {sizes.num_rows, -1});
    inner_contiguous({"block_table", block_table});
    sizes.max_blocks = block_table.size(1);
    sizes.max_pages = sizes.max_blocks * (sizes.block_tokens / sizes.page_size);
    per_row(seq_lens, budget_pages, sizes);
  }

  void per_row(const Tensor& seq_lens, const Tensor& budget_pages, const Sizes& sizes) const {
    for (const Arg& arg : {Arg{"seq_lens", seq_lens}, Arg{"budget_pages", budget_pages}}) {
      dtype(arg, ScalarType::Int);
      shape(arg, {sizes.num_rows});
      inner_contiguous(arg);
    }
  }

 private:
  const char* op_;
  Device device_;
};

inline ScoreKind check_score_kind(const char* op, const std::string& score) {
  if (score == "minmax") return ScoreKind::kMinMax;
  if (score == "mean_std") return ScoreKind::kMeanStd;
  if (score == "mid_dev") return ScoreKind::kMidDev;
  QUEST_CHECK(score == "codes", op, "values",
              "score must be minmax, mean_std, mid_dev or codes, got ", score);
  return ScoreKind::kCodes;
}

inline Sizes check_write_kv(Device device, const Tensor& key, const Tensor& value,
                            const Tensor& kv_cache, const Tensor& slot_mapping, int64_t page_size,
                            ScoreKind kind) {
  const Checks check("write_kv", device);
  Sizes sizes;
  check.device(
      {{"kv_cache", kv_cache}, {"key", key}, {"value", value}, {"slot_mapping", slot_mapping}});
  check.cache(kv_cache, page_size, kind, sizes);
  check.dtypes({{"key", key}, {"value", value}}, model_dtype(kv_cache));
  check.shape({"key", key}, {-1, sizes.num_kv_heads, sizes.head_size});
  check.shape({"value", value}, {key.size(0), sizes.num_kv_heads, sizes.head_size});
  check.inner_contiguous({"key", key});
  check.inner_contiguous({"value", value});
  check.dtype({"slot_mapping", slot_mapping}, ScalarType::Long);
  check.shape({"slot_mapping", slot_mapping}, {-1});
  check.inner_contiguous({"slot_mapping", slot_mapping});
  sizes.num_slots = slot_mapping.size(0);
  QUEST_CHECK(sizes.num_slots <= key.size(0), "write_kv", "shape",
              "slot_mapping must have at most key's ", key.size(0), " entries, got ",
              sizes.num_slots);
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  QUEST_CHECK(sizes.num_slots <= kMaxSlots, "write_kv", "shape", "slot_mapping may have ",
              kMaxSlots, " entries, got ", sizes.num_slots);
  return sizes;
}

// A tensor with room for a number for every page of all rows' tables.
inline void check_room_for_pages(const char* op, Device device, const Tensor& kv_cache,
                                 const Arg& arg, ScalarType dtype, const Sizes& sizes,
                                 int64_t num_heads) {
  const Checks check(op, device);
  check.device({{"kv_cache", kv_cache}, arg});
  check.dtype(arg, dtype);
  check.shape(arg, {sizes.num_rows, num_heads, -1});
  QUEST_CHECK(arg.tensor.size(2) >= sizes.max_pages, op, "shape", arg.name, " must have room for ",
              sizes.max_pages, " pages, got ", arg.tensor.size(2));
  check.inner_contiguous(arg);
}

// The columns of masses: pages, and behind them groups. Both begin at multiples of 16 bytes.
struct MassColumns {
  int64_t first_group, all;
};

inline MassColumns mass_columns(const Sizes& sizes) {
  constexpr int64_t kAtOnce = 4;
  const auto rounded_up = [](int64_t n) { return (n + kAtOnce - 1) / kAtOnce * kAtOnce; };
  const int64_t first_group = rounded_up(sizes.max_pages);
  return {first_group, first_group + rounded_up(sizes.max_pages * sizes.page_size / kGroupTokens)};
}

inline void check_masses(const char* op, Device device, const Tensor& kv_cache,
                         const Tensor& masses, const Sizes& sizes) {
  const Checks check(op, device);
  const Arg arg = {"masses", masses};
  check.device({{"kv_cache", kv_cache}, arg});
  check.dtype(arg, ScalarType::Float);
  check.shape(arg, {sizes.num_rows, sizes.num_heads, -1});
  const int64_t columns = mass_columns(sizes).all;
  QUEST_CHECK(masses.size(2) >= columns, op, "shape", "masses must have ", columns,
              " columns for pages and groups, got ", masses.size(2));
  check.inner_contiguous(arg);
}

// What `score`, `score_codes` and `weigh_pages` have in common.
inline Sizes check_scored_rows(const char* op, Device device, const Tensor& query,
                               const Tensor& kv_cache, const Tensor& block_table,
                               const Tensor& seq_lens, const Tensor& budget_pages,
                               int64_t page_size, ScoreKind kind) {
  const Checks check(op, device);
  Sizes sizes;
  check.device({{"kv_cache", kv_cache},
                {"query", query},
                {"block_table", block_table},
                {"seq_lens", seq_lens},
                {"budget_pages", budget_pages}});
  check.cache(kv_cache, page_size, kind, sizes);
  check.rows(query, kv_cache, block_table, seq_lens, budget_pages, sizes);
  return sizes;
}

inline Sizes check_weigh_pages(const char* op, Device device, const Tensor& query,
                               const Tensor& kv_cache, const Tensor& block_table,
                               const Tensor& seq_lens, const Tensor& budget_pages,
                               int64_t page_size, const Tensor& masses) {
  const Sizes sizes = check_scored_rows(op, device, query, kv_cache, block_table, seq_lens,
                                        budget_pages, page_size, ScoreKind::kCodes);
  check_masses(op, device, kv_cache, masses, sizes);
  return sizes;
}

// Of `score` and `score_codes`, the latter with masses.
inline Sizes check_score(const char* op, Device device, const Tensor& query, const Tensor& kv_cache,
                         const Tensor& block_table, const Tensor& seq_lens,
                         const Tensor& budget_pages, int64_t page_size, ScoreKind kind,
                         const Tensor* masses, const Tensor& scores) {
  const Sizes sizes = check_scored_rows(op, device, query, kv_cache, block_table, seq_lens,
                                        budget_pages, page_size, kind);
  check_room_for_pages(op, device, kv_cache, {"scores", scores}, ScalarType::Float, sizes,
                       sizes.num_kv_heads);
  if (masses != nullptr) check_masses(op, device, kv_cache, *masses, sizes);
  return sizes;
}

// A count that no row reaches serves for all larger ones.
inline Kept check_kept(const char* op, int64_t first_pages, int64_t newest_percent) {
  QUEST_CHECK(first_pages >= 0, op, "values", "keep_first_pages must be at least 0, got ",
              first_pages);
  QUEST_CHECK(0 <= newest_percent && newest_percent <= 100, op, "values",
              "keep_newest_percent must be 0 to 100, got ", newest_percent);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return {static_cast<int>(std::min(first_pages, kMost)), static_cast<int>(newest_percent)};
}

inline Sizes check_select(Device device, const Tensor& scores, const Tensor& seq_lens,
                          const Tensor& budget_pages, int64_t page_size, const Tensor& pages) {
  const Checks check("select", device);
  Sizes sizes;
  check.device({{"scores", scores},
                {"seq_lens", seq_lens},
                {"budget_pages", budget_pages},
                {"pages", pages}});
  check.dtype({"scores", scores}, ScalarType::Float);
  check.shape({"scores", scores}, {-1, -1, -1});
  check.inner_contiguous({"scores", scores});
  QUEST_CHECK(page_size > 0, "select", "shape", "page_size must be positive, got ", page_size);
  sizes.num_rows = scores.size(0);
  sizes.num_kv_heads = scores.size(1);
  sizes.max_pages = scores.size(2);
  sizes.page_size = page_size;
  check.per_row(seq_lens, budget_pages, sizes);
  check.dtype({"pages", pages}, ScalarType::Int);
  check.shape({"pages", pages}, {sizes.num_rows, sizes.num_kv_heads, -1});
  check.inner_contiguous({"pages", pages});
  sizes.max_selected = pages.size(2);
  return sizes;
}

inline Sizes check_decode(const char* op, Device device, const Tensor& query,
                          const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_lens,
                          const Tensor& budget_pages, int64_t page_size, ScoreKind kind,
                          const Tensor& out) {
  const Checks check(op, device);
  Sizes sizes;
  check.device({{"kv_cache", kv_cache},
                {"query", query},
                {"block_table", block_table},
                {"seq_lens", seq_lens},
                {"budget_pages", budget_pages},
                {"out", out}});
  check.cache(kv_cache, page_size, kind, sizes);
  check.rows(query, kv_cache, block_table, seq_lens, budget_pages, sizes);
  check.dtype({"out", out}, query.scalar_type());
  check.shape({"out", out}, {sizes.num_rows, sizes.num_heads, sizes.head_size});
  check.inner_contiguous({"out", out});
  return sizes;
}

// Also fills in how many pages can be selected.
inline void check_selected(const char* op, Device device, const Tensor& kv_cache,
                           const Tensor& pages, Sizes& sizes) {
  const Checks check(op, device);
  check.device({{"kv_cache", kv_cache}, {"pages", pages}});
  check.dtype({"pages", pages}, ScalarType::Int);
  check.shape({"pages", pages}, {sizes.num_rows, sizes.num_kv_heads, -1});
  check.inner_contiguous({"pages", pages});
  sizes.max_selected = pages.size(2);
}

// One more logit for each query head; null where heads have none.
inline const void* check_sinks(const char* op, Device device, const Tensor& query,
                               const std::optional<Tensor>& sinks, const Sizes& sizes) {
  if (!sinks.has_value()) return nullptr;
  const Checks check(op, device);
  check.device({{"query", query}, {"sinks", *sinks}});
  check.dtype({"sinks", *sinks}, query.scalar_type());
  check.shape({"sinks", *sinks}, {sizes.num_heads});
  check.inner_contiguous({"sinks", *sinks});
  return sinks->data_ptr();
}

// The scales of an fp8 cache, a number each; null for other caches.
inline KvScales check_scales(const char* op, Device device, const Tensor& kv_cache,
                             const std::optional<Tensor>& key_scale,
                             const std::optional<Tensor>& value_scale) {
  const bool has_both = key_scale.has_value() && value_scale.has_value();
  const bool has_any = key_scale.has_value() || value_scale.has_value();
  QUEST_CHECK(is_fp8(kv_cache) ? has_both : !has_any, op, "values",
              "key_scale and value_scale belong to a kv_cache of Float8_e4m3fn, which needs both; "
              "got ",
              has_both ? "both" : (has_any ? "one" : "none"), " and a kv_cache of ",
              torch::headeronly::toString(kv_cache.scalar_type()));
  if (!has_both) return {};
  const Checks check(op, device);
  for (const Arg& arg : {Arg{"key_scale", *key_scale}, Arg{"value_scale", *value_scale}}) {
    check.device({{"kv_cache", kv_cache}, arg});
    check.dtype(arg, ScalarType::Float);
    QUEST_CHECK(arg.tensor.numel() == 1, op, "shape", arg.name, " must be one number, got ",
                join(arg.tensor.sizes()));
  }
  return {.key = static_cast<const float*>(key_scale->data_ptr()),
          .value = static_cast<const float*>(value_scale->data_ptr())};
}

// Where to count; null where nothing is to be counted.
inline int64_t* check_counters(const char* op, Device device, const Tensor& kv_cache,
                               const std::optional<Tensor>& counters) {
  if (!counters.has_value()) return nullptr;
  const Checks check(op, device);
  check.device({{"kv_cache", kv_cache}, {"counters", *counters}});
  check.dtype({"counters", *counters}, ScalarType::Long);
  check.shape({"counters", *counters}, {kNumCounters});
  check.inner_contiguous({"counters", *counters});
  return static_cast<int64_t*>(counters->data_ptr());
}

}  // namespace quest
