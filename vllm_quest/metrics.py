"""The counters as `vllm:quest_*` on the server's own `/metrics`, and in `LLM.get_metrics()`.

Workers and API servers are different processes, and vLLM carries no numbers of a backend from one
to the other. Prometheus' client has a way of its own: each process writes its counters to a file,
and whoever is asked for metrics adds up a directory of them. vLLM does so where it runs several API
servers (PROMETHEUS_MULTIPROC_DIR): then workers write there, and nothing else is needed. Otherwise
the process that makes the configuration, which is the one that answers `/metrics`, makes a
directory, registers a collector of it, and tells its children by an environment variable.
"""

import contextlib
import multiprocessing
import os
import uuid
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.logger import init_logger

from vllm_quest.counters import Counts
from vllm_quest.own_folder import OwnFolder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.quest")

VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
OUR_DIRECTORY = "QUEST_METRICS_DIR"
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""Which variables vLLM sets in Ray's workers too, besides those that it knows; comma-separated."""

UNIT = "per decode row, layer and KV head"

HELP = {
    "vllm:quest_sparse_rows": "Rows that attended to selected pages",
    "vllm:quest_dense_rows": "Rows that attended in full",
    "vllm:quest_pages_scored": "Pages whose bounds or codes were read",
    "vllm:quest_pages_read": "Pages whose keys and values were read",
    "vllm:quest_pages_full": "Pages that full attention would have read",
}
"""The counters, in the order of `Counts`."""

UNPUBLISHED = "QUEST's counters will not be on /metrics"
FILE_BYTES = 1 << 16
"""What `MmapedDict` makes of an empty file, and then maps."""

_made_here: OwnFolder | None = None


def expose() -> None:
    """Let this process's `/metrics` show what its workers will write. Safe to call again."""
    global _made_here
    names = [name for name in os.environ.get(RAY_COPIES, "").split(",") if name]
    os.environ[RAY_COPIES] = ",".join(dict.fromkeys([*names, VLLM_DIRECTORY, OUR_DIRECTORY]))
    if VLLM_DIRECTORY in os.environ or _made_here is not None:
        return
    if multiprocessing.current_process().name.startswith("EngineCore"):
        return  # it checks the configuration anew, and answers no `/metrics`
    try:
        _made_here = OwnFolder("vllm-quest-metrics-")
    except OSError as error:
        logger.warning_once("%s (%s): set TMPDIR to a folder with room", UNPUBLISHED, error)
        return
    os.environ[OUR_DIRECTORY] = _made_here.name
    collector = MultiProcessCollector(None, path=_made_here.name)  # type: ignore[no-untyped-call]
    REGISTRY.register(collector)


def _reserve(path: str) -> None:
    """Make a worker's file with room on the disk for all of it.

    `MmapedDict` would make a file of holes. Writing to one of them on a full disk ends the process
    with a bus error.

    Raises:
        OSError: the disk is full, or the directory cannot be written to.
    """
    try:
        with open(path, "xb") as file:
            file.write(bytes(FILE_BYTES))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)  # half a file would stop who reads them all
        raise


class Publisher:
    """Writes one worker's counts of one engine to where `/metrics` will find them."""

    def __init__(self, vllm_config: "VllmConfig") -> None:
        directory = os.environ.get(VLLM_DIRECTORY, os.environ.get(OUR_DIRECTORY, ""))
        self._file: MmapedDict | None = None
        if not os.path.isdir(directory):
            logger.warning_once(
                "%s: this worker does not share a directory with the API server (on another "
                "machine?)",
                UNPUBLISHED,
            )
            return
        # The collector takes the name up to the first _ for the metrics' type.
        name = f"counter_quest-{uuid.uuid4().hex}.db"
        path = os.path.join(directory, name)
        try:
            _reserve(path)
            self._file = MmapedDict(path)  # type: ignore[no-untyped-call]
        except OSError as error:
            logger.warning_once("%s (%s): make room and start again", UNPUBLISHED, error)
            return
        labels = {
            "model_name": str(vllm_config.model_config.served_model_name),
            "engine": str(vllm_config.parallel_config.data_parallel_index),
        }
        self._keys = [
            mmap_key(name, f"{name}_total", list(labels), list(labels.values()), f"{text}, {UNIT}.")
            for name, text in HELP.items()
        ]

    def publish(self, counts: Counts) -> None:
        """Write the counts since the engine started."""
        if self._file is not None:
            for key, value in zip(self._keys, counts.values(), strict=True):
                self._file.write_value(key, float(value), 0.0)  # type: ignore[no-untyped-call]
