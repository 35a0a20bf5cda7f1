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

// Whether the current device has clusters of CTAs.
bool has_clusters();

// Instead of score, select and sparse_decode, where has_clusters().
cudaError_t cluster_decode(const ClusterDecodeParams&, cudaStream_t stream);

// CTAs for which sparse_decode's workspace must have room on the current device.
int max_decode_ctas();

}  // namespace quest::cuda
