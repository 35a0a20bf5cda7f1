"""vLLM's offloading of KV blocks where it has none: from a CPU's KV cache to other host memory.

Scheduler, connector and the plan of what to copy are vLLM's own. Only the copies are made here, in
place of those by CUDA streams.
"""

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    """`spec_name` of an OffloadingConnector, with `spec_module_path` naming this module."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return HostWorker(kv_caches, self.num_chunks)


class HostWorker(OffloadingWorker):
    """Copies `page_size_bytes` of a block and layer, as vLLM's copy descriptors say."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        self.caches = [cache.tensor for cache in kv_caches.tensors]
        self.refs_of_group = kv_caches.group_data_refs
        self.stored = [
            torch.zeros(num_chunks, cache.page_size_bytes, dtype=torch.int8)
            for cache in kv_caches.tensors
        ]
        self.finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec):
        return self._copy(job_id, src_spec, self.caches, dst_spec, self.stored, src_spec)

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec):
        return self._copy(job_id, src_spec, self.stored, dst_spec, self.caches, dst_spec)

    def _copy(self, job_id, source, source_tensors, target, target_tensors, in_cache) -> bool:
        ends = np.cumsum(in_cache.group_sizes)
        num_bytes = 0
        for refs, size, end in zip(self.refs_of_group, in_cache.group_sizes, ends, strict=True):
            group = slice(end - size, end)
            for ref in refs:
                from_rows = torch.from_numpy(source.block_ids[group]).long()
                to_rows = torch.from_numpy(target.block_ids[group]).long()
                moved = source_tensors[ref.tensor_idx][from_rows, : ref.page_size_bytes]
                target_tensors[ref.tensor_idx][to_rows, : ref.page_size_bytes] = moved
                num_bytes += moved.numel()
        self.finished.append(TransferResult(job_id, True, num_bytes, 1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass
