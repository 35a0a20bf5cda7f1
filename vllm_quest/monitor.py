"""A worker's counters: where they live, who reads them, the periodic log line.

Decode steps add to the counters on the device. Before each step a copy to the host is enqueued, on
a stream of its own and waited for by no one; a thread that never speaks to the device looks at what
arrived, every few seconds. So the log and the metrics may lack an engine's last two steps until it
takes another. `quest_counts` waits for the device, and lacks nothing.
"""

import operator
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_quest.config import QuestConfig, engine_key
from vllm_quest.counters import Counts, QuestStats
from vllm_quest.metrics import Publisher

logger = init_logger("vllm.quest")

LOOK_EVERY_S = 2.0


class Monitor:
    """The counters of one engine in this worker; its metadata builders share them."""

    _of_engine: ClassVar["weakref.WeakValueDictionary[int, Monitor]"] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.quest = QuestConfig.from_vllm(vllm_config)
        num_counters = len(Counts().values())
        self.counters = _zeros_beside_pools(num_counters, device)
        """[5] int64, in the order of `Counts`. Stays in place: CUDA graphs hold its address."""

        self._on_host, self._copying = self.counters, None
        if device.type == "cuda":
            self._on_host = torch.zeros(num_counters, dtype=torch.int64, pin_memory=True)
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured = False
        self.is_replica = _is_replica(vllm_config)
        """Whether another worker counts for the same KV heads."""

        self._publisher = None if self.is_replica else Publisher(vllm_config)
        self._logs = vllm_config.parallel_config.rank == 0
        self._logged = _Logged(time.monotonic(), Counts())
        self._watcher: threading.Thread | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> "Monitor":
        """The engine's monitor, made if there is none."""
        engine = engine_key(vllm_config)
        monitor = cls._of_engine.get(engine)
        if monitor is None:
            monitor = cls._of_engine[engine] = cls(vllm_config, device)
        return monitor

    @classmethod
    def existing(cls, vllm_config: VllmConfig) -> "Monitor | None":
        """The engine's monitor; None before the KV cache was made, and where no layer needs one."""
        return cls._of_engine.get(engine_key(vllm_config))

    def before_step(self) -> None:
        """Enqueue a look at the counters, as the steps before this one leave them."""
        self._forget_captures()
        if self._copying is not None:
            with torch.cuda.stream(self._copying):
                self._on_host.copy_(self.counters, non_blocking=True)
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=_watch, args=(weakref.ref(self),), name="quest-monitor", daemon=True
            )
            self._watcher.start()

    def before_capture(self) -> None:
        """A CUDA graph is about to be captured, after warm-up steps that count for nothing."""
        self._captured = True

    def counts(self) -> Counts:
        """The counts as of now. Waits for the device."""
        self._forget_captures()
        return Counts(*self.counters.tolist())

    def _forget_captures(self) -> None:
        if self._captured:
            self.counters.zero_()
            self._captured = False

    def look(self) -> None:
        """Publish what has arrived on the host, and log it if it is time."""
        counts = Counts(*self._on_host.tolist())
        if self._publisher is not None:
            self._publisher.publish(counts)
        now = time.monotonic()
        if now - self._logged.at < envs.VLLM_LOG_STATS_INTERVAL:
            return
        before = self._logged.counts
        self._logged = _Logged(now, counts)
        if self._logs and counts.pages_full > before.pages_full:
            recent = map(operator.sub, counts.values(), before.values())
            stats = QuestStats.of(Counts(*recent), self.quest.page_size, self.quest.score)
            logger.info("%s", describe(stats))


def _is_replica(vllm_config: VllmConfig) -> bool:
    """Whether a worker before this one has the same KV heads.

    Where tensor parallelism has more ranks than a model has KV heads, ranks side by side share one.
    """
    parallel = vllm_config.parallel_config
    num_ranks = parallel.tensor_parallel_size
    ranks_per_head = max(1, num_ranks // vllm_config.model_config.get_total_num_kv_heads())
    return bool(parallel.rank % num_ranks % ranks_per_head)


def _zeros_beside_pools(size: int, device: torch.device) -> torch.Tensor:
    """Zeros, int64, that can be read while the engine sleeps.

    vLLM makes an engine's state in memory pools, which sleep unmaps. A pool holds for the thread
    that entered it (torch.cuda.use_mem_pool), so another thread allocates.
    """

    def make() -> torch.Tensor:
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # before other streams use it
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


@dataclass(frozen=True)
class _Logged:
    at: float
    """By the monotonic clock, in seconds."""

    counts: Counts


def describe(recent: QuestStats) -> str:
    """The log line about an interval."""
    return (
        f"QUEST rows sparse: {recent.share_of_rows_sparse:.1%}, "
        f"KV bytes read: {recent.share_of_kv_bytes_read:.1%} of full attention's, "
        f"Pages attended to: {recent.share_of_pages_read:.1%}"
    )


def _watch(of: "weakref.ref[Monitor]") -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        monitor = of()
        if monitor is None:
            return
        monitor.look()
        del monitor


class WorkerExtension:
    """A method that every vLLM worker gets where QUEST is selected (`--worker-extension-cls`)."""

    vllm_config: VllmConfig

    def quest_counts(self) -> dict[str, Any]:
        """This worker's counts, in the order of `Counts`, the page size in tokens, and the score.

        They are 0 where another worker counts for the same KV heads.
        """
        monitor = Monitor.existing(self.vllm_config)
        quest = QuestConfig.from_vllm(self.vllm_config)
        counts = Counts() if monitor is None or monitor.is_replica else monitor.counts()
        return {"counts": counts.values(), "page_size": quest.page_size, "score": quest.score}
