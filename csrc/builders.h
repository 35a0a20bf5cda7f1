// Builds the parts of params.h from tensors that checks.h has checked.
#pragma once

#include "checks.h"
#include "params.h"

namespace quest {

// Element `row` of a tensor's first dimension.
template <typename T>
T* row_of(const Tensor& tensor, int64_t row = 0) {
  const int64_t element_bytes = tensor.element_size();
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) +
                              row * tensor.stride(0) * element_bytes);
}

inline int32_t* int32s(const Tensor& tensor, int64_t row = 0) {
  return row_of<int32_t>(tensor, row);
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8;
    default:
      return DType::kFloat32;
  }
}

inline KvCache cache_of(const Tensor& kv_cache, const Sizes& sizes) {
  return {.data = kv_cache.data_ptr(),
          .block_stride = kv_cache.stride(0),
          .head_stride = kv_cache.stride(1),
          .dtype = dtype_of(kv_cache),
          .num_kv_heads = static_cast<int>(sizes.num_kv_heads),
          .head_size = static_cast<int>(sizes.head_size),
          .block_tokens = static_cast<int>(sizes.block_tokens),
          .page_size = static_cast<int>(sizes.page_size),
          .pages_per_block = static_cast<int>(sizes.block_tokens / sizes.page_size)};
}

// The masses of rows from `row` on.
inline Masses masses_of(const Tensor& masses, const Sizes& sizes, int64_t row) {
  return {.data = row_of<float>(masses, row),
          .row_stride = masses.stride(0),
          .head_stride = masses.stride(1),
          .first_group = static_cast<int>(mass_columns(sizes).first_group)};
}

// What write_kv is given, on both devices.
inline WriteKvParams write_kv_params(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                     const Tensor& slot_mapping, ScoreKind score,
                                     const Sizes& sizes) {
  return {.cache = cache_of(kv_cache, sizes),
          .key = key.data_ptr(),
          .value = value.data_ptr(),
          .slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr()),
          .key_token_stride = key.stride(0),
          .key_head_stride = key.stride(1),
          .value_token_stride = value.stride(0),
          .value_head_stride = value.stride(1),
          .num_slots = static_cast<int>(sizes.num_slots),
          .score = score};
}

// Rows [first_row, first_row + num_rows) of a batch.
inline Rows rows_of(const Tensor& block_table, const Tensor& seq_lens, const Tensor& budget_pages,
                    int64_t first_row, int64_t num_rows) {
  return {.block_table = int32s(block_table, first_row),
          .block_table_stride = block_table.stride(0),
          .seq_lens = int32s(seq_lens, first_row),
          .budget_pages = int32s(budget_pages, first_row),
          .num_rows = static_cast<int>(num_rows),
          .max_blocks = static_cast<int>(block_table.size(1))};
}

}  // namespace quest
