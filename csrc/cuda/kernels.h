// One launch per stage, on `stream`, without allocation or synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "../params.h"

namespace quest::cuda {

constexpr int kMaxRows = 2048;  // rows of a launch; shared memory holds a number for each

cudaError_t write_kv(const WriteKvParams&, const KvScales&, cudaStream_t stream);
// For the score `codes`, behind write_kv.
cudaError_t write_codes(const WriteKvParams&, cudaStream_t stream);
cudaError_t score(const ScoreParams&, cudaStream_t stream);
cudaError_t weigh_pages(const ScoreCodesParams&, cudaStream_t stream);
cudaError_t score_masses(const ScoreCodesParams&, cudaStream_t stream);
cudaError_t select(const SelectParams&, cudaStream_t stream);

cudaError_t sparse_decode(const SparseDecodeParams&, const KvScales&, cudaStream_t stream);

// Instead of score, select and sparse_decode. Block tables of more than max_cluster_pages(...,
// false) pages a row need far keys.
cudaError_t cluster_decode(const ClusterDecodeParams&, const FarKeys&, const KvScales&,
                           cudaStream_t stream);

// Pages that a row may have in cluster_decode on the current device, for a cache's element type and
// head size: without far keys those whose keys fit shared memory. 0 where there are no clusters of
// CTAs (before sm_90).
int max_cluster_pages(const KvCache&, int group_size, bool has_far_keys);

// CTAs for which sparse_decode's workspace must have room on the current device.
int max_decode_ctas();

}  // namespace quest::cuda
