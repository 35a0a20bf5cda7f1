"""QUEST is a name that vLLM knows in every process, and changes nothing unless selected."""

import copy
import pickle
import subprocess
import sys
from unittest.mock import Mock

import cloudpickle
import pytest
from vllm import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from engines import DENSE, generate, greedy, random_prompts, write_model
from vllm_quest import plugin


def test_the_backend_is_registered_by_its_entry_point():
    code = (
        "from vllm.plugins import load_general_plugins as load; load();"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E;"
        "print(E['QUEST'].get_class().get_name())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split()[-1:] == ["QUEST"], answer.stderr


def test_registering_twice_is_harmless():
    member = AttentionBackendEnum["QUEST"]
    plugin.register()
    assert AttentionBackendEnum["QUEST"] is member


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_the_member_survives_pickling(module, protocol):
    member = AttentionBackendEnum["QUEST"]
    assert pickle.loads(module.dumps(member, protocol)) is member
    assert copy.deepcopy(member) is member


def test_a_fresh_process_unpickles_the_member_before_it_loads_plugins():
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    pickled = pickle.dumps(AttentionBackendEnum["QUEST"])
    answer = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True)
    assert answer.stdout.split()[-1:] == [b"QUEST"], answer.stderr.decode()


UNSELECTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import conftest
from engines import engine, greedy, random_prompts, token_ids
with engine(sys.argv[1], backend="CPU_ATTN") as llm:
    tokens = token_ids(llm, random_prompts([5, 200]), greedy(8))
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    print([layer.impl.__class__.__name__ for layer in layers][0], tokens)
"""


def test_unselected_vllm_behaves_as_without_the_plugin(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    arguments = [sys.executable, "-c", UNSELECTED, model, str(__file__).rpartition("/")[0]]
    answers = []
    for plugins in (None, "none_of_them"):
        if plugins is not None:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        process = subprocess.run(arguments, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        answers.append(process.stdout.splitlines()[-1])
    assert answers[0].startswith("CPUAttentionBackendImpl")
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("backend", "section"), [(DENSE, "quest"), (DENSE, "Quest"), ("QUEST", "quest")]
)
def test_settings_without_the_backend_are_told_of(tmp_path, monkeypatch, backend, section):
    """As where the backend is named by VLLM_ATTENTION_BACKEND, which vLLM no longer reads."""
    monkeypatch.setattr(plugin, "logger", log := Mock())
    settings = {section: {"token_budget": 64}}
    options = {"attention_backend": backend, "additional_config": settings}
    EngineArgs(write_model(tmp_path), skip_tokenizer_init=True, **options).create_engine_config()
    told = [call.args[0] for call in log.warning.call_args_list]
    assert ["QUEST is not chosen: attention is dense" in text for text in told] == (
        [True] if backend == DENSE else []
    )


def test_selected_by_kind_of_layer(tmp_path):
    model = write_model(tmp_path / "model")
    prompts = random_prompts([40])
    by_kind = generate(
        model,
        prompts,
        greedy(4),
        backend=None,
        attention_config={"backend_per_kind": {"full_attention": "QUEST"}},
        additional_config={"quest": {"token_budget": -1}},
    )
    assert by_kind == generate(model, prompts, greedy(4), backend=DENSE)
