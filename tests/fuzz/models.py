"""The small models that engines are drawn from, written when one is needed."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

from eagle import make_next_id_likely, write_eagle_head
from engines import write_fp8_scales, write_model, write_weights
from families import FAMILIES, random_weights

DEMO_MODEL = Path(__file__).parents[2] / "vllm_quest" / "demo_model"


@dataclass(frozen=True)
class Model:
    """What the drawing of an engine must know of a model."""

    weight: int
    """How often it is drawn, beside the others."""

    full_layers: int
    """Full-attention layers."""

    family: str = ""
    """A name of `families.FAMILIES`; empty for Llamas with weights on disk."""

    has_tokenizer: bool = False
    can_speculate: bool = False
    is_hybrid: bool = False
    has_windows: bool = False

    @property
    def on_disk(self) -> bool:
        """Whether workers that are processes of their own find its weights."""
        return not self.family


MODELS = {
    "llama": Model(4, 4),
    "guessable": Model(5, 3, can_speculate=True),
    "demo": Model(3, 4, has_tokenizer=True),
    "Qwen2": Model(1, 3, family="Qwen2"),
    "Phi-3": Model(1, 3, family="Phi-3"),
    "Gemma 2": Model(2, 2, family="Gemma 2", has_windows=True),
    "gpt-oss": Model(2, 2, family="gpt-oss", has_windows=True),
    "Llama 4": Model(1, 2, family="Llama 4", has_windows=True),
    "LFM2": Model(2, 2, family="LFM2", is_hybrid=True),
}
"""By name; `demo` is the bundled model."""

LAYERS = {"llama": 4, "guessable": 3}


def write(name: str, folder: Path, *, is_fp8: bool = False) -> str:
    """The folder of a model, written to `folder` unless it is there.

    With `is_fp8` the checkpoint, if it is one that tests write, has an fp8 KV cache and scales.
    """
    path = folder / (name.replace(" ", "-") + "-fp8" * is_fp8)
    if (path / "config.json").exists():
        return str(path)
    family = MODELS[name].family
    if family:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(FAMILIES[family].config))
    elif name == "demo":
        shutil.copytree(DEMO_MODEL, path)
    else:
        write_weights(write_model(path, num_hidden_layers=LAYERS[name]))
        if name == "guessable":
            make_next_id_likely(str(path))
        if is_fp8:
            write_fp8_scales(str(path))
    return str(path)


def write_head(folder: Path) -> str:
    """An EAGLE head for `guessable`."""
    path = folder / "head"
    return str(path) if path.exists() else write_eagle_head(path)


def vocabulary(name: str) -> int:
    """Token ids that prompts may have, from 3 on."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    return int(config["vocab_size"]) if name == "demo" else 512


def embeddings(model: str, dtype: torch.dtype) -> Tensor:
    """Of the token ids of a model on disk, `[vocabulary, hidden_size]`."""
    weight = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    return weight.to(dtype)


@contextlib.contextmanager
def loadable() -> Iterator[None]:
    """Let engines of this process make up weights for families that make attention matter."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(DummyModelLoader, "load_weights", random_weights))
        # vLLM inspects each model class in a process of its own, which takes seconds.
        patches.enter_context(
            mock.patch.object(registry, "_run_in_subprocess", lambda inspect: inspect())
        )
        yield


def family_options(name: str) -> dict[str, Any]:
    """Engine options that a model cannot do without."""
    family = MODELS[name].family
    return dict(FAMILIES[family].options) if family else {}
