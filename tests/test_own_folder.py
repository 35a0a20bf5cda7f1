"""A process's temporary folder goes when the next one starts, if the process was killed."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vllm_quest import metrics
from vllm_quest.own_folder import LOCK, OwnFolder

PREFIX = "quest-test-"
LONGEST_S = 60


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The system's temporary folder, as far as this process and its forks know."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def own(told: Connection, forks: bool) -> None:
    """Make a folder, and wait to be killed; also in a fork."""
    folder = OwnFolder(PREFIX)
    fork = os.fork() if forks else 0
    signal.alarm(LONGEST_S)
    if fork or not forks:
        told.send((folder.name, fork))
    signal.pause()


@contextlib.contextmanager
def owner(*, forks: bool = False) -> Iterator[tuple[multiprocessing.process.BaseProcess, Path]]:
    """A process with a folder of its own, and with a fork that is killed at the end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=own, args=(there, forks))
    process.start()
    name, fork = here.recv()
    try:
        yield process, Path(name)
    finally:
        process.kill()
        process.join()
        if fork:
            os.kill(fork, signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_and_nothing_else(temporary):
    with owner() as (_, left):
        (left / "counter.db").write_bytes(bytes(10))
    assert list(temporary.iterdir()) == [left]
    other, unlocked = temporary / "other-1", temporary / f"{PREFIX}of-an-earlier-version"
    for each in (other, unlocked):
        each.mkdir()
    (other / LOCK).touch()
    with owner() as (_, of_alive):
        assert not left.exists()
        own_folder = OwnFolder(PREFIX)
        assert set(temporary.iterdir()) == {other, unlocked, of_alive, Path(own_folder.name)}


def test_a_fork_of_the_owner_keeps_it(temporary):
    """As an engine's process does, which still writes its counters there."""
    with owner(forks=True) as (process, folder):
        process.kill()
        process.join()
        next_one = OwnFolder(PREFIX)
        assert set(temporary.iterdir()) == {folder, Path(next_one.name)}


def test_an_engines_process_makes_none_for_metrics(temporary, monkeypatch):
    """Its server has one; as vLLM calls it, see `vllm/v1/engine/utils.py`."""
    monkeypatch.setattr(metrics, "_made_here", None)
    monkeypatch.delenv(metrics.VLLM_DIRECTORY, raising=False)
    monkeypatch.setattr(multiprocessing.current_process(), "name", "EngineCore_DP0")
    metrics.expose()
    assert list(temporary.iterdir()) == []
