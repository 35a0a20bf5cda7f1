"""How the GPU benchmarks measure: work in a CUDA graph, and the bandwidth of a copy."""

import gc
import statistics
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda")
COLD_BYTES = 256 << 20
"""What is read between two visits of a layer: several times the L2 cache."""
COPY_BYTES = 4 << 30
REPLAY_MS = 40.0
"""How long each time is measured for."""


def time_us(visit: Callable[[int], None], num_layers: int) -> float:
    """Median time of one visit of one layer, over replays of a graph that visits each in turn."""
    for i in range(num_layers):
        visit(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_layers):
            visit(i)

    def replay_ms() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    replay_ms()
    replays = max(7, min(100, int(REPLAY_MS / replay_ms())))
    return statistics.median(replay_ms() for _ in range(replays)) * 1000 / num_layers


def copy_bytes_per_us() -> float:
    """Bytes read and written by the best of several copies."""
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)

    def copy_us() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(8):
            target.copy_(source)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / 8

    return 2 * COPY_BYTES / min(copy_us() for _ in range(5))


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
