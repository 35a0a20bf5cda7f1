// The operators' schemas, and their CPU implementations: check, fill in the parameters, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "builders.h"
#include "checks.h"
#include "contract.h"
#include "cpu/dispatch.h"

namespace quest {
namespace {

// Refuse lengths and budgets that lead out of the tensors: on the CPU they can be read.
void check_rows(const char* op, const Tensor& seq_lens, const Tensor& budget_pages,
                const Sizes& sizes, bool has_pages) {
  for (int64_t row = 0; row < sizes.num_rows; ++row) {
    const int64_t seq_len = int32s(seq_lens)[row], row_budget_pages = int32s(budget_pages)[row];
    const int64_t capacity = sizes.max_pages * sizes.page_size;
    QUEST_CHECK(0 <= seq_len && seq_len <= capacity, op, "values", "seq_lens must be 0 to ",
                capacity, " tokens, got ", seq_len, " in row ", row);
    QUEST_CHECK(row_budget_pages >= 1, op, "values", "budget_pages must be at least 1 page, got ",
                row_budget_pages, " in row ", row);
    QUEST_CHECK(!has_pages || row_budget_pages <= sizes.max_selected ||
                    row_budget_pages * sizes.page_size >= seq_len,
                op, "values", "budget_pages must be at most max_selected = ", sizes.max_selected,
                " pages for longer rows, got ", row_budget_pages, " in row ", row);
  }
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
              const Tensor& slot_mapping, int64_t page_size, std::string score,
              const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const ScoreKind kind = check_score_kind("write_kv", score);
  const Sizes sizes =
      check_write_kv(Device::kCpu, key, value, kv_cache, slot_mapping, page_size, kind);
  check_scales("write_kv", Device::kCpu, kv_cache, key_scale, value_scale);
  const WriteKvParams params = write_kv_params(key, value, kv_cache, slot_mapping, kind, sizes);
  kernels().write_kv(params);
  if (kind == ScoreKind::kCodes) kernels().write_codes(params);
}

void score(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
           const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
           const Tensor& scores) {
  const Sizes sizes = check_score("score", Device::kCpu, query, kv_cache, block_table, seq_lens,
                                  budget_pages, page_size, ScoreKind::kMinMax, nullptr, scores);
  check_rows("score", seq_lens, budget_pages, sizes, false);
  kernels().score({.cache = cache_of(kv_cache, sizes),
                   .rows = rows_of(block_table, seq_lens, budget_pages, 0, sizes.num_rows),
                   .query = query.data_ptr(),
                   .scores = static_cast<float*>(scores.data_ptr()),
                   .query_row_stride = query.stride(0),
                   .query_head_stride = query.stride(1),
                   .scores_row_stride = scores.stride(0),
                   .scores_head_stride = scores.stride(1),
                   .group_size = sizes.group_size()});
}

void score_codes(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                 const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
                 double scale, double soft_cap, const Tensor& masses, const Tensor& scores) {
  const char* op = "score_codes";
  const Sizes sizes = check_score(op, Device::kCpu, query, kv_cache, block_table, seq_lens,
                                  budget_pages, page_size, ScoreKind::kCodes, &masses, scores);
  check_rows(op, seq_lens, budget_pages, sizes, false);
  kernels().score_codes({.cache = cache_of(kv_cache, sizes),
                         .rows = rows_of(block_table, seq_lens, budget_pages, 0, sizes.num_rows),
                         .query = query.data_ptr(),
                         .masses = masses_of(masses, sizes, 0),
                         .scores = static_cast<float*>(scores.data_ptr()),
                         .query_row_stride = query.stride(0),
                         .query_head_stride = query.stride(1),
                         .scores_row_stride = scores.stride(0),
                         .scores_head_stride = scores.stride(1),
                         .group_size = sizes.group_size(),
                         .scale = static_cast<float>(scale),
                         .soft_cap = static_cast<float>(soft_cap)});
}

void select(const Tensor& scores, const Tensor& seq_lens, const Tensor& budget_pages,
            int64_t page_size, const Tensor& pages, int64_t keep_first_pages,
            int64_t keep_newest_percent) {
  const Sizes sizes = check_select(Device::kCpu, scores, seq_lens, budget_pages, page_size, pages);
  check_rows("select", seq_lens, budget_pages, sizes, true);
  kernels().select({.scores = static_cast<const float*>(scores.data_ptr()),
                    .seq_lens = int32s(seq_lens),
                    .budget_pages = int32s(budget_pages),
                    .pages = static_cast<int32_t*>(pages.data_ptr()),
                    .scores_row_stride = scores.stride(0),
                    .scores_head_stride = scores.stride(1),
                    .pages_row_stride = pages.stride(0),
                    .pages_head_stride = pages.stride(1),
                    .num_rows = static_cast<int>(sizes.num_rows),
                    .num_kv_heads = static_cast<int>(sizes.num_kv_heads),
                    .page_size = static_cast<int>(sizes.page_size),
                    .kept = check_kept("select", keep_first_pages, keep_newest_percent)});
}

void sparse_decode(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                   const Tensor& seq_lens, const Tensor& budget_pages, const Tensor& pages,
                   int64_t page_size, double scale, double soft_cap, const Tensor& out,
                   const std::optional<Tensor>& /* workspace: GPUs need one */,
                   const std::optional<Tensor>& counters, std::string score,
                   const std::optional<Tensor>& sinks, const std::optional<Tensor>& key_scale,
                   const std::optional<Tensor>& value_scale) {
  const char* op = "sparse_decode";
  Sizes sizes = check_decode(op, Device::kCpu, query, kv_cache, block_table, seq_lens, budget_pages,
                             page_size, check_score_kind(op, score), out);
  check_selected(op, Device::kCpu, kv_cache, pages, sizes);
  check_scales(op, Device::kCpu, kv_cache, key_scale, value_scale);
  check_rows("sparse_decode", seq_lens, budget_pages, sizes, true);
  int64_t* const counted = check_counters("sparse_decode", Device::kCpu, kv_cache, counters);
  kernels().sparse_decode({.cache = cache_of(kv_cache, sizes),
                           .rows = rows_of(block_table, seq_lens, budget_pages, 0, sizes.num_rows),
                           .query = query.data_ptr(),
                           .pages = int32s(pages),
                           .out = out.data_ptr(),
                           .query_row_stride = query.stride(0),
                           .query_head_stride = query.stride(1),
                           .pages_row_stride = pages.stride(0),
                           .pages_head_stride = pages.stride(1),
                           .out_row_stride = out.stride(0),
                           .out_head_stride = out.stride(1),
                           .group_size = sizes.group_size(),
                           .scale = static_cast<float>(scale),
                           .soft_cap = static_cast<float>(soft_cap),
                           .counters = counted,
                           .sinks = check_sinks(op, Device::kCpu, query, sinks, sizes)});
}

int64_t contract(std::string name) {
  struct Constant {
    const char* name;
    int64_t value;
  };
  constexpr Constant kConstants[] = {{"unsettled_pages", kUnsettledPages},
                                     {"growing_pages", kGrowingPages},
                                     {"max_group_size", kMaxGroupSize},
                                     {"group_tokens", kGroupTokens},
                                     {"group_rows", kGroupRows}};
  const Constant* found = nullptr;
  std::string names;
  for (const Constant& constant : kConstants) {
    if (name == constant.name) found = &constant;
    names += (names.empty() ? "" : ", ") + std::string(constant.name);
  }
  QUEST_CHECK(found != nullptr, "contract", "values", "name must be one of ", names, ", got ",
              name);
  return found->value;
}

void use_cpu_isa(const std::string& isa) {
  QUEST_CHECK(use_isa(isa), "use_cpu_isa", "values", "isa must be one of ", supported_isas(),
              ", got ", isa);
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_quest, library) {
  library.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "int page_size, str score=\"minmax\", Tensor? key_scale=None, Tensor? value_scale=None) -> "
      "()");
  library.def(
      "score(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor "
      "budget_pages, "
      "int page_size, Tensor(a!) scores) -> ()");
  library.def(
      "score_codes(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor "
      "budget_pages, int page_size, float scale, float soft_cap, Tensor(a!) masses, Tensor(b!) "
      "scores) -> ()");
  library.def(
      "select(Tensor scores, Tensor seq_lens, Tensor budget_pages, int page_size, "
      "Tensor(a!) pages, int keep_first_pages=0, int keep_newest_percent=0) -> ()");
  library.def(
      "sparse_decode(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor budget_pages, Tensor pages, int page_size, float scale, float soft_cap, "
      "Tensor(a!) out, Tensor(b!)? workspace=None, Tensor(c!)? counters=None, "
      "str score=\"minmax\", Tensor? sinks=None, Tensor? key_scale=None, "
      "Tensor? value_scale=None) -> ()");
  library.def("contract(str name) -> int");
  // For tests: the CPU kernels come in several instruction sets.
  library.def("cpu_isas() -> str");
  library.def("use_cpu_isa(str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_quest, CPU, library) {
  library.impl("write_kv", TORCH_BOX(&write_kv));
  library.impl("score", TORCH_BOX(&score));
  library.impl("score_codes", TORCH_BOX(&score_codes));
  library.impl("select", TORCH_BOX(&select));
  library.impl("sparse_decode", TORCH_BOX(&sparse_decode));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_quest, CompositeExplicitAutograd, library) {
  library.impl("contract", TORCH_BOX(&contract));
  library.impl("cpu_isas", TORCH_BOX(&supported_isas));
  library.impl("use_cpu_isa", TORCH_BOX(&use_cpu_isa));
}

}  // namespace quest
