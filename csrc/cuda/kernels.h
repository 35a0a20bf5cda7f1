// One launch per stage, on `stream`, without allocation or synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace quest::cuda {

constexpr int kMaxRows = 2048;  // of a launch: what shared memory has room for
constexpr int kMaxGroupSize = 16;

cudaError_t write_kv(const WriteKvParams&, cudaStream_t stream);
cudaError_t score(const ScoreParams&, cudaStream_t stream);
cudaError_t select(const SelectParams&, cudaStream_t stream);

cudaError_t sparse_decode(const SparseDecodeParams&, cudaStream_t stream);

// Instead of score, select and sparse_decode. Tables of more than max_cluster_pages() a row need
// far keys, and may have kFarFactor times as many.
constexpr int kFarFactor = 32;
cudaError_t cluster_decode(const ClusterDecodeParams&, const FarKeys&, cudaStream_t stream);

// Pages of a row whose scores fit cluster_decode's shared memory on the current device, for a
// cache's element type and head size; 0 where there are no clusters of CTAs (before sm_90).
int max_cluster_pages(const KvCache&, int group_size);

// CTAs for which sparse_decode's workspace must have room on the current device.
int max_decode_ctas();

}  // namespace quest::cuda
