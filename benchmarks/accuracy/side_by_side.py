"""A grid measured by several processes at once: a small model leaves most of a machine idle.

The grid falls into parts that no two engines share. Each process takes one after the other, adds
its cells to the same file, and has its share of the GPU's memory or of the processor's cores.
"""

import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.cells import Store
from benchmarks.accuracy.interface import ignore
from benchmarks.accuracy.measure import VLLM_METHODS, Measurement
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tokens import Tokens

SECONDS_PER_PROGRESS = 2.0

_count: Callable[[int], object] = ignore
"""In a process of its own: tells the parent of tokens computed."""

VLLM_SHARE = 0.9
"""Of a GPU's memory, what the engines may take together; half of it holds keys and values."""


def parts(plan: Plan) -> list[Plan]:
    """Plans that together make up the whole, those that take long first.

    The methods of one vLLM engine stay together; each of the others, which run in plain PyTorch, is
    a part of its own.
    """
    inside = tuple(method for method in plan.methods if method in VLLM_METHODS)
    outside = [(method,) for method in plan.methods if method not in VLLM_METHODS]
    return [
        replace(plan, tasks=(task,), contexts=(context,), dense_layers=(dense,), methods=methods)
        for context in sorted(plan.contexts, reverse=True)
        for methods in (*outside, inside)
        if methods
        for task in plan.tasks
        for dense in plan.dense_layers
    ]


def measure(
    measurement: Measurement, num_processes: int, *, finished_cells: Callable[[], object]
) -> None:
    """Measure what is not in the store, and read it back.

    Args:
        measurement: of the whole plan; its samples are made.
        num_processes: how many run at once.
        finished_cells: called when cells have been added to the store.

    Raises:
        Exception: the first one of a part, after all other parts have ended.
    """
    store = measurement.store
    whole = replace(
        measurement.plan,
        engine_args=_memory_share(num_processes) | measurement.plan.engine_args,
    )
    unfinished = set(measurement.unfinished())
    num_unfinished = len(unfinished)
    spawn = multiprocessing.get_context("spawn")
    computed = spawn.Value("q", 0)
    errors = []
    with (
        _share_of_cores(num_processes),
        ProcessPoolExecutor(num_processes, spawn, initializer=_begin, initargs=(computed,)) as pool,
        tqdm(
            total=measurement.num_tokens(unfinished),
            unit="token",
            unit_scale=True,
            desc=f"{num_processes} processes",
        ) as progress,
    ):
        running = {
            pool.submit(_measure, part, store, measurement.machine)
            for part in parts(whole)
            if not unfinished.isdisjoint(part.all_cells())
        }
        try:
            while running:
                done, running = wait(running, timeout=SECONDS_PER_PROGRESS)
                progress.update(computed.value - progress.n)
                store.reload()
                if len(measurement.unfinished()) < num_unfinished:
                    num_unfinished = len(measurement.unfinished())
                    finished_cells()
                for part in done:
                    if error := part.exception():
                        errors.append(error)
                    else:
                        for what, reason in part.result().items():
                            measurement.skipped.add(what, reason)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if errors:
        raise errors[0]


def _begin(computed: Any) -> None:
    """In a process of its own: count tokens where the parent reads them, and end with the parent.

    Args:
        computed: a shared number of 64 bits, with a lock.
    """

    def count(tokens: int) -> None:
        with computed.get_lock():
            computed.value += tokens

    global _count
    _count = count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure(part: Plan, store: Store, machine: str) -> dict[str, str]:
    """In a process of its own: what was skipped, and why. The parent tells of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        measurement = Measurement(part, store, Tokens(part.model), machine)
        measurement.make_samples()
        measurement.run(computed=_count)
    return measurement.skipped.reasons


def _memory_share(num_processes: int) -> dict[str, Any]:
    """Engine arguments that let so many engines live on one GPU."""
    if not torch.cuda.is_available():
        return {}
    share = VLLM_SHARE / num_processes
    total = torch.cuda.get_device_properties(0).total_memory
    # Stated, since vLLM finds out what is free by looking, while others take and give back.
    return {"gpu_memory_utilization": share, "kv_cache_memory_bytes": int(total * share / 2)}


@contextlib.contextmanager
def _share_of_cores(num_processes: int) -> Iterator[None]:
    """Processes started meanwhile have their share of threads, and no progress bars."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    own = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
