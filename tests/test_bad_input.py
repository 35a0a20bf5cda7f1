"""Bad input gets one clear line: what docs/bad-input.md says of settings, requests and folders."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines import engine, write_model, write_weights
from vllm_quest import extension, metrics
from vllm_quest.budgets import requested_budget
from vllm_quest.config import LONGEST_SHOWN, QuestConfig
from vllm_quest.counters import Counts
from vllm_quest.support import fits_vllm

ROOT = Path(__file__).parents[1]
LONG = "x" * 10**6
UNICODE = "бюджет\n预算\u202e\x00"


def test_each_try_of_the_table_has_its_test():
    """The last column names it."""
    table = (ROOT / "docs" / "bad-input.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        file, name = re.search(r"`(test_\w+\.py)::(test_\w+)`", row).groups()
        [path] = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), row


BAD_SETTINGS = {
    "Unicode for a key": {UNICODE: 1},
    "a very long key": {LONG: 1},
    "Unicode for a number": {"token_budget": UNICODE},
    "a very long value": {"score": LONG},
    "a list of a million": {"page_size": [0] * 10**6},
    "a nested section": {"quest": {"token_budget": 64}},
    "no number": {"token_budget": float("nan")},
    "infinity": {"token_budget": float("inf")},
    "a key that is a number": {7: 7},
}


def is_one_short_line(error: Exception) -> bool:
    """Whether a terminal shows it as it is."""
    message = str(error)
    return len(message) < 5 * LONGEST_SHOWN and "\n" not in message and "\x00" not in message


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_odd_settings_are_refused_in_one_short_line(what):
    with pytest.raises(ValueError) as error:
        QuestConfig.from_settings(BAD_SETTINGS[what])
    assert is_one_short_line(error.value)


@pytest.mark.parametrize("key", ["quest_" + UNICODE, "quest_" + LONG])
def test_an_odd_key_beside_the_section_is_refused_in_one_short_line(key):
    with pytest.raises(ValueError) as error:
        QuestConfig.from_vllm(SimpleNamespace(additional_config={key: 1}))
    assert is_one_short_line(error.value)


BAD_REQUESTS = {
    "Unicode for a key": {"quest_" + UNICODE: 64},
    "a very long key": {"quest_" + LONG: 64},
    "Unicode for a budget": {"quest_token_budget": UNICODE},
    "a very long budget": {"quest_token_budget": LONG},
    "digits of another script": {"quest_token_budget": "٦٤"},
    "an object": {"quest_token_budget": {"tokens": [64] * 10**5}},
    "no number": {"quest_token_budget": float("nan")},
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_odd_requests_are_refused_in_one_short_line(what):
    with pytest.raises(ValueError) as error:
        requested_budget(BAD_REQUESTS[what])
    assert is_one_short_line(error.value)
    assert "quest_token_budget" in str(error.value)


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    """It never had one."""


FOLDERS = {
    "truncated weights": (cut_weights, "metadata, file not fully covered"),
    "no weights": (no_weights, "Cannot find any model weights with"),
    "no configuration": (no_config, "ensure the presence of a 'config.json'"),
    "no tokenizer": (no_tokenizer, "Couldn't instantiate the backend tokenizer"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_broken_model_folder_is_refused(tmp_path, what):
    """By vLLM, and QUEST adds nothing."""
    damage, words = FOLDERS[what]
    model = write_weights(write_model(tmp_path, num_hidden_layers=1))
    damage(tmp_path)
    options = {"load_format": "auto", "skip_tokenizer_init": what != "no tokenizer"}
    with pytest.raises(Exception) as error, engine(model, **options):
        pass
    assert words in str(error.value)
    assert "QUEST" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.31.9", False), ("0.32.0", True), ("0.32.1+cpu", True), ("0.34.0", False), ("1.0", False)],
)
def test_which_versions_of_vllm_are_served(version, fits):
    assert fits_vllm(version) == fits


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Where the CPU's operators are looked for; nothing was loaded before."""
    path = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(extension, "library", lambda device: path)
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    return path


@pytest.mark.parametrize("share", [0, 1e-5, 0.5, 0.999])
def test_a_truncated_operator_library_is_told_its_cure(library, share):
    real = Path(extension.__file__).with_name(extension.LIBRARIES["cpu"]).read_bytes()
    library.write_bytes(real[: int(share * len(real))])
    reason = extension.why_missing("cpu")
    assert "\n" not in reason
    assert "the operators for cpu do not load" in reason and extension.BUILD in reason


def test_an_operator_library_of_another_cuda_is_told_its_cure(library, tmp_path):
    """One that asks for a library of a CUDA that is not there."""
    (tmp_path / "empty.c").write_text("void nothing(void) {}\n")
    runtime = tmp_path / "libcudart.so.99"
    compiler = ["cc", "-shared", "-fPIC", str(tmp_path / "empty.c")]
    subprocess.run([*compiler, "-Wl,-soname,libcudart.so.99", "-o", str(runtime)], check=True)
    needs = ["-Wl,--no-as-needed", str(runtime)]
    subprocess.run([*compiler, *needs, "-o", str(library)], check=True)
    runtime.unlink()
    reason = extension.why_missing("cpu")
    assert "\n" not in reason
    assert "libcudart.so.99: cannot open shared object file" in reason and extension.BUILD in reason


def publisher(monkeypatch, directory: Path) -> metrics.Publisher:
    """A worker's, of a directory of metrics."""
    monkeypatch.setenv(metrics.VLLM_DIRECTORY, str(directory))
    model, parallel = SimpleNamespace(served_model_name="m"), SimpleNamespace(data_parallel_index=0)
    return metrics.Publisher(SimpleNamespace(model_config=model, parallel_config=parallel))


def test_counters_are_published(tmp_path, monkeypatch):
    """Or the tests below would show nothing."""
    publisher(monkeypatch, tmp_path).publish(Counts(1, 2, 3, 4, 5))
    [file] = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= metrics.FILE_BYTES  # no hole that a full disk could hit


ON_A_FULL_DISK = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import resource, signal, sys
from types import SimpleNamespace as N
from vllm_quest.counters import Counts
from vllm_quest.metrics import Publisher
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
model, parallel = N(served_model_name="m"), N(data_parallel_index=0)
Publisher(N(model_config=model, parallel_config=parallel)).publish(Counts(1, 2, 3, 4, 5))
print("goes on")
"""


@pytest.fixture(scope="module")
def on_a_full_disk(tmp_path_factory):
    """What a worker's counters say, and leave, where no file may grow beyond 4 KiB, and where the
    home is no folder. A mapped file on a full disk would be a bus error."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "home").write_text("a file")
    (folder / "metrics").mkdir()
    environment = os.environ | {
        "HOME": str(folder / "home"),
        metrics.VLLM_DIRECTORY: str(folder / "metrics"),
    }
    command = [sys.executable, "-c", ON_A_FULL_DISK]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return process, list((folder / "metrics").iterdir())


def test_a_full_disk_costs_the_metrics_alone(on_a_full_disk):
    process, files = on_a_full_disk
    assert process.stdout.splitlines()[-1:] == ["goes on"], process.stderr[-2000:]
    lines = (process.stdout + process.stderr).splitlines()
    [line] = [line for line in lines if metrics.UNPUBLISHED in line]
    assert "make room" in line
    assert files == []  # half a file would stop who reads them all


def test_a_home_that_cannot_be_written_to(on_a_full_disk):
    """QUEST does without."""
    process, _ = on_a_full_disk
    assert "QUEST is not available" not in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


def test_no_room_for_the_directory_costs_the_metrics_alone(monkeypatch):
    def no_room(**_):
        raise OSError(28, "No space left on device", "/tmp/vllm-quest-metrics-1")

    monkeypatch.setattr(metrics, "_made_here", None)
    monkeypatch.delenv(metrics.VLLM_DIRECTORY, raising=False)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", no_room)
    told = []
    monkeypatch.setattr(
        metrics.logger, "warning_once", lambda text, *more: told.append(text % more)
    )
    metrics.expose()
    [line] = told
    assert metrics.UNPUBLISHED in line and "TMPDIR" in line
