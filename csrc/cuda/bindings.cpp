// The operators' CUDA implementations: check, fill in the parameters, launch.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

#include "../builders.h"
#include "../checks.h"
#include "../contract.h"
#include "kernels.h"

namespace quest::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kBytesAtOnce = 16;  // Kernels load 16 bytes at once.

void check_aligned(const char* op, const Arg& arg) {
  const int64_t element_bytes = arg.tensor.element_size();
  const auto address = reinterpret_cast<uintptr_t>(arg.tensor.data_ptr());
  bool aligned = address % kBytesAtOnce == 0;
  for (int64_t dim = 0; dim + 1 < arg.tensor.dim(); ++dim) {
    aligned = aligned && (arg.tensor.size(dim) <= 1 ||
                          arg.tensor.stride(dim) * element_bytes % kBytesAtOnce == 0);
  }
  QUEST_CHECK(aligned, op, "layout", arg.name, "'s rows must begin at multiples of ", kBytesAtOnce,
              " bytes, got address ", address, " and strides ", join(arg.tensor.strides()));
}

void check_cache(const char* op, const Tensor& kv_cache, const Sizes& sizes) {
  check_aligned(op, {"kv_cache", kv_cache});
  const int64_t head_size = sizes.head_size;
  QUEST_CHECK(head_size == 64 || head_size == 96 || head_size == 128 || head_size == 256, op,
              "shape", "head_size must be 64, 96, 128 or 256 on a GPU, got ", head_size);
}

void check_group(const char* op, const Sizes& sizes) {
  const int64_t group_size = sizes.group_size();
  QUEST_CHECK(group_size <= kMaxGroupSize, op, "shape", "a GPU takes at most ", kMaxGroupSize,
              " query heads per KV head, got ", group_size);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "vllm_quest::", op, ": CUDA: ", cudaGetErrorString(error));
}

// Calls f(first row, number of rows) for as many rows at a time as a launch takes.
template <typename F>
void for_rows(int64_t num_rows, F f) {
  for (int64_t first = 0; first < num_rows; first += kMaxRows) {
    f(first, std::min<int64_t>(kMaxRows, num_rows - first));
  }
}

void write_kv_op(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                 const Tensor& slot_mapping, int64_t page_size, std::string score,
                 const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const char* op = "write_kv";
  const ScoreKind kind = check_score_kind(op, score);
  const Sizes sizes =
      check_write_kv(Device::kCuda, key, value, kv_cache, slot_mapping, page_size, kind);
  const KvScales scales = check_scales(op, Device::kCuda, kv_cache, key_scale, value_scale);
  check_cache(op, kv_cache, sizes);
  check_aligned(op, {"key", key});
  check_aligned(op, {"value", value});
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  QUEST_CHECK(sizes.num_blocks * sizes.block_tokens <= kMaxTokens, op, "shape",
              "kv_cache may have ", kMaxTokens, " tokens on a GPU, got ", sizes.num_blocks,
              " blocks of ", sizes.block_tokens);
  if (sizes.num_slots == 0) return;
  const DeviceGuard guard(kv_cache.get_device_index());
  const WriteKvParams params = write_kv_params(key, value, kv_cache, slot_mapping, kind, sizes);
  check_launch(op, write_kv(params, scales, current_stream(kv_cache)));
  if (kind == ScoreKind::kCodes) check_launch(op, write_codes(params, current_stream(kv_cache)));
}

void score_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
              const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
              const Tensor& scores) {
  const char* op = "score";
  const Sizes sizes = check_score(op, Device::kCuda, query, kv_cache, block_table, seq_lens,
                                  budget_pages, page_size, ScoreKind::kMinMax, nullptr, scores);
  check_cache(op, kv_cache, sizes);
  check_group(op, sizes);
  check_aligned(op, {"query", query});
  const DeviceGuard guard(kv_cache.get_device_index());
  for_rows(sizes.num_rows, [&](int64_t row, int64_t num_rows) {
    check_launch(op, score({.cache = cache_of(kv_cache, sizes),
                            .rows = rows_of(block_table, seq_lens, budget_pages, row, num_rows),
                            .query = row_of<void>(query, row),
                            .scores = row_of<float>(scores, row),
                            .query_row_stride = query.stride(0),
                            .query_head_stride = query.stride(1),
                            .scores_row_stride = scores.stride(0),
                            .scores_head_stride = scores.stride(1),
                            .group_size = sizes.group_size()},
                           current_stream(kv_cache)));
  });
}

// Weighs pages, and scores them too if there is a place for scores.
void weigh_and_score(const char* op, const Tensor& query, const Tensor& kv_cache,
                     const Tensor& block_table, const Tensor& seq_lens, const Tensor& budget_pages,
                     double scale, double soft_cap, const Tensor& masses, const Tensor* scores,
                     const Sizes& sizes) {
  check_cache(op, kv_cache, sizes);
  check_group(op, sizes);
  check_aligned(op, {"query", query});
  check_aligned(op, {"masses", masses});
  const DeviceGuard guard(kv_cache.get_device_index());
  for_rows(sizes.num_rows, [&](int64_t row, int64_t num_rows) {
    ScoreCodesParams params = {.cache = cache_of(kv_cache, sizes),
                               .rows = rows_of(block_table, seq_lens, budget_pages, row, num_rows),
                               .query = row_of<void>(query, row),
                               .masses = masses_of(masses, sizes, row),
                               .query_row_stride = query.stride(0),
                               .query_head_stride = query.stride(1),
                               .group_size = sizes.group_size(),
                               .scale = static_cast<float>(scale),
                               .soft_cap = static_cast<float>(soft_cap)};
    check_launch(op, weigh_pages(params, current_stream(kv_cache)));
    if (scores == nullptr) return;
    params.scores = row_of<float>(*scores, row);
    params.scores_row_stride = scores->stride(0);
    params.scores_head_stride = scores->stride(1);
    check_launch(op, score_masses(params, current_stream(kv_cache)));
  });
}

void weigh_pages_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
                    double scale, double soft_cap, const Tensor& masses) {
  const char* op = "weigh_pages";
  const Sizes sizes = check_weigh_pages(op, Device::kCuda, query, kv_cache, block_table, seq_lens,
                                        budget_pages, page_size, masses);
  weigh_and_score(op, query, kv_cache, block_table, seq_lens, budget_pages, scale, soft_cap, masses,
                  nullptr, sizes);
}

void score_codes_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
                    double scale, double soft_cap, const Tensor& masses, const Tensor& scores) {
  const char* op = "score_codes";
  const Sizes sizes = check_score(op, Device::kCuda, query, kv_cache, block_table, seq_lens,
                                  budget_pages, page_size, ScoreKind::kCodes, &masses, scores);
  weigh_and_score(op, query, kv_cache, block_table, seq_lens, budget_pages, scale, soft_cap, masses,
                  &scores, sizes);
}

void select_op(const Tensor& scores, const Tensor& seq_lens, const Tensor& budget_pages,
               int64_t page_size, const Tensor& pages, int64_t keep_first_pages,
               int64_t keep_newest_percent) {
  const char* op = "select";
  const Sizes sizes = check_select(Device::kCuda, scores, seq_lens, budget_pages, page_size, pages);
  const Kept kept = check_kept(op, keep_first_pages, keep_newest_percent);
  const DeviceGuard guard(scores.get_device_index());
  for_rows(sizes.num_rows, [&](int64_t row, int64_t num_rows) {
    check_launch(op, select({.scores = row_of<float>(scores, row),
                             .seq_lens = int32s(seq_lens, row),
                             .budget_pages = int32s(budget_pages, row),
                             .pages = int32s(pages, row),
                             .scores_row_stride = scores.stride(0),
                             .scores_head_stride = scores.stride(1),
                             .pages_row_stride = pages.stride(0),
                             .pages_head_stride = pages.stride(1),
                             .num_rows = static_cast<int>(num_rows),
                             .num_kv_heads = static_cast<int>(sizes.num_kv_heads),
                             .max_pages = static_cast<int>(sizes.max_pages),
                             .page_size = static_cast<int>(sizes.page_size),
                             .kept = kept},
                            current_stream(scores)));
  });
}

// The size in int32 on the current device. Arrivals come first, so their place is the same for
// every shape that uses the workspace.
int64_t decode_workspace_size(int64_t group_size, int64_t head_size) {
  const int64_t ctas = max_decode_ctas();
  return ctas + 2 * ctas * group_size * (head_size + 2);
}

DecodeWorkspace check_workspace(const char* op, const Tensor& kv_cache,
                                const std::optional<Tensor>& workspace, const Sizes& sizes) {
  const int64_t group_size = sizes.group_size();
  const int64_t needed = decode_workspace_size(group_size, sizes.head_size);
  QUEST_CHECK(workspace.has_value(), op, "shape", "a GPU needs a workspace of ", needed,
              " int32: make it with vllm_quest.ops.decode_workspace");
  const Checks check(op, Device::kCuda);
  check.device({{"kv_cache", kv_cache}, {"workspace", *workspace}});
  check.dtype({"workspace", *workspace}, ScalarType::Int);
  QUEST_CHECK(workspace->is_contiguous() && workspace->numel() >= needed, op, "shape",
              "workspace must have ", needed, " contiguous int32, got shape ",
              join(workspace->sizes()), ": make it with vllm_quest.ops.decode_workspace");
  auto* const arrivals = static_cast<int32_t*>(workspace->data_ptr());
  auto* const partial_out = reinterpret_cast<float*>(arrivals + max_decode_ctas());
  float* const end = partial_out + 2 * max_decode_ctas() * group_size * sizes.head_size;
  return {.arrivals = arrivals,
          .partial_out = partial_out,
          .partial_state = reinterpret_cast<SoftmaxState*>(end)};
}

// Check the arguments, and fill in the parameters that all rows have in common.
SparseDecodeParams decode_params(const char* op, const Tensor& query, const Tensor& kv_cache,
                                 const Tensor& block_table, const Tensor& seq_lens,
                                 const Tensor& budget_pages, int64_t page_size, double scale,
                                 double soft_cap, const Tensor& out,
                                 const std::optional<Tensor>& workspace,
                                 const std::optional<Tensor>& counters,
                                 const std::optional<Tensor>& sinks, ScoreKind kind, Sizes& sizes) {
  sizes = check_decode(op, Device::kCuda, query, kv_cache, block_table, seq_lens, budget_pages,
                       page_size, kind, out);
  int64_t* const counted = check_counters(op, Device::kCuda, kv_cache, counters);
  check_cache(op, kv_cache, sizes);
  check_group(op, sizes);
  check_aligned(op, {"query", query});
  const DeviceGuard guard(kv_cache.get_device_index());
  return {.cache = cache_of(kv_cache, sizes),
          .workspace = check_workspace(op, kv_cache, workspace, sizes),
          .query_row_stride = query.stride(0),
          .query_head_stride = query.stride(1),
          .out_row_stride = out.stride(0),
          .out_head_stride = out.stride(1),
          .group_size = sizes.group_size(),
          .scale = static_cast<float>(scale),
          .soft_cap = static_cast<float>(soft_cap),
          .counters = counted,
          .sinks = check_sinks(op, Device::kCuda, query, sinks, sizes)};
}

void sparse_decode_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                      const Tensor& seq_lens, const Tensor& budget_pages, const Tensor& pages,
                      int64_t page_size, double scale, double soft_cap, const Tensor& out,
                      const std::optional<Tensor>& workspace, const std::optional<Tensor>& counters,
                      std::string score, const std::optional<Tensor>& sinks,
                      const std::optional<Tensor>& key_scale,
                      const std::optional<Tensor>& value_scale) {
  const char* op = "sparse_decode";
  Sizes sizes;
  SparseDecodeParams params =
      decode_params(op, query, kv_cache, block_table, seq_lens, budget_pages, page_size, scale,
                    soft_cap, out, workspace, counters, sinks, check_score_kind(op, score), sizes);
  check_selected(op, Device::kCuda, kv_cache, pages, sizes);
  const KvScales scales = check_scales(op, Device::kCuda, kv_cache, key_scale, value_scale);
  params.pages_row_stride = pages.stride(0);
  params.pages_head_stride = pages.stride(1);
  const DeviceGuard guard(kv_cache.get_device_index());
  for_rows(query.size(0), [&](int64_t row, int64_t num_rows) {
    params.rows = rows_of(block_table, seq_lens, budget_pages, row, num_rows);
    params.query = row_of<void>(query, row);
    params.pages = int32s(pages, row);
    params.out = row_of<void>(out, row);
    check_launch(op, sparse_decode(params, scales, current_stream(kv_cache)));
  });
}

void cluster_decode_op(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                       const Tensor& seq_lens, const Tensor& budget_pages, int64_t page_size,
                       double scale, double soft_cap, const Tensor& out,
                       const std::optional<Tensor>& workspace,
                       const std::optional<Tensor>& counters, const std::optional<Tensor>& far_keys,
                       bool follows_write_kv, int64_t keep_first_pages, int64_t keep_newest_percent,
                       std::string score, const std::optional<Tensor>& sinks,
                       const std::optional<Tensor>& masses, const std::optional<Tensor>& key_scale,
                       const std::optional<Tensor>& value_scale) {
  const char* op = "cluster_decode";
  const ScoreKind kind = check_score_kind(op, score);
  const Kept kept = check_kept(op, keep_first_pages, keep_newest_percent);
  Sizes sizes;
  SparseDecodeParams params =
      decode_params(op, query, kv_cache, block_table, seq_lens, budget_pages, page_size, scale,
                    soft_cap, out, workspace, counters, sinks, kind, sizes);
  const KvScales scales = check_scales(op, Device::kCuda, kv_cache, key_scale, value_scale);
  const bool has_masses = kind == ScoreKind::kCodes;
  QUEST_CHECK(has_masses == masses.has_value(), op, "values",
              "masses, from weigh_pages, belong to the score codes alone, got score ", score,
              has_masses ? " without masses" : " and masses");
  QUEST_CHECK(!(has_masses && follows_write_kv), op, "values",
              "follows_write_kv must be false for the score codes: weigh_pages is in between");
  if (has_masses) {
    check_masses(op, Device::kCuda, kv_cache, *masses, sizes);
    check_aligned(op, {"masses", *masses});
  }
  const DeviceGuard guard(kv_cache.get_device_index());
  const int max_near_pages = max_cluster_pages(params.cache, params.group_size, false);
  QUEST_CHECK(max_near_pages > 0, op, "device", "this GPU has no clusters of CTAs: use ",
              has_masses ? "score_codes" : "score", ", select, sparse_decode");
  // Whether there are far keys is decided here alone; the launcher reads FarKeys::data.
  const bool has_far_keys = sizes.max_pages > max_near_pages;
  if (has_far_keys) {
    const int max_pages = max_cluster_pages(params.cache, params.group_size, true);
    QUEST_CHECK(far_keys.has_value(), op, "values", "block_table may hold ", max_near_pages,
                " pages a row without far_keys, got ", sizes.max_pages);
    QUEST_CHECK(sizes.max_pages <= max_pages, op, "shape", "block_table may hold ", max_pages,
                " pages a row, got ", sizes.max_pages, ": use ",
                has_masses ? "score_codes" : "score", ", select, sparse_decode");
    const Arg arg = {"far_keys", *far_keys};
    check_room_for_pages(op, Device::kCuda, kv_cache, arg, ScalarType::Int, sizes,
                         sizes.num_kv_heads);
    check_aligned(op, arg);
  }
  for_rows(query.size(0), [&](int64_t row, int64_t num_rows) {
    params.rows = rows_of(block_table, seq_lens, budget_pages, row, num_rows);
    params.query = row_of<void>(query, row);
    params.out = row_of<void>(out, row);
    FarKeys keys = {};
    if (has_far_keys) {
      keys = {.data = row_of<uint32_t>(*far_keys, row),
              .row_stride = far_keys->stride(0),
              .head_stride = far_keys->stride(1)};
    }
    check_launch(op,
                 cluster_decode({.decode = params,
                                 .masses = has_masses ? masses_of(*masses, sizes, row) : Masses{},
                                 .kept = kept,
                                 .follows_write_kv = follows_write_kv && row == 0},
                                keys, scales, current_stream(kv_cache)));
  });
}

int64_t max_cluster_pages_op(int64_t group_size, int64_t head_size, bool has_far_keys,
                             bool is_fp8) {
  KvCache cache = {};
  cache.dtype = is_fp8 ? DType::kFloat8 : DType::kBFloat16;
  cache.head_size = static_cast<int>(head_size);
  return max_cluster_pages(cache, static_cast<int>(group_size), has_far_keys);
}

std::string cuda_archs() { return QUEST_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_quest, library) {
  library.def("decode_workspace_size(int group_size, int head_size) -> int");
  library.def(
      "cluster_decode(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor budget_pages, int page_size, float scale, float soft_cap, Tensor(a!) out, "
      "Tensor(b!)? workspace=None, Tensor(c!)? counters=None, Tensor(d!)? far_keys=None, "
      "bool follows_write_kv=False, int keep_first_pages=0, int keep_newest_percent=0, "
      "str score=\"minmax\", Tensor? sinks=None, Tensor? masses=None, Tensor? key_scale=None, "
      "Tensor? value_scale=None) -> ()");
  library.def(
      "weigh_pages(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor "
      "budget_pages, int page_size, float scale, float soft_cap, Tensor(a!) masses) -> ()");
  library.def(
      "max_cluster_pages(int group_size, int head_size, bool far_keys=False, bool is_fp8=False) "
      "-> int");
  library.def("cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_quest, CUDA, library) {
  library.impl("write_kv", TORCH_BOX(&write_kv_op));
  library.impl("score", TORCH_BOX(&score_op));
  library.impl("weigh_pages", TORCH_BOX(&weigh_pages_op));
  library.impl("score_codes", TORCH_BOX(&score_codes_op));
  library.impl("select", TORCH_BOX(&select_op));
  library.impl("sparse_decode", TORCH_BOX(&sparse_decode_op));
  library.impl("cluster_decode", TORCH_BOX(&cluster_decode_op));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_quest, CompositeExplicitAutograd, library) {
  library.impl("decode_workspace_size", TORCH_BOX(&decode_workspace_size));
  library.impl("max_cluster_pages", TORCH_BOX(&max_cluster_pages_op));
  library.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}

}  // namespace quest::cuda
