"""Decoders that read images: causal ones are served, and the others with text alone."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

from checked_ops import check_operators
from engines import DENSE, ON_GPU, agree, answers, engine, greedy, random_prompts, token_ids
from families import FAMILIES, random_weights
from image_models import CAUSAL, IMAGE_PIXELS, NOT_CAUSAL, as_text
from vllm_quest import stats

NUM_TOKENS = 8
QUEST = {"token_budget": 32, "dense_layers": 1}
COVERING = greedy(NUM_TOKENS, extra_args={"quest_token_budget": -1})
OPTIONS = {"max_model_len": 1024, "max_num_seqs": 4, "dtype": "bfloat16" if ON_GPU else "float32"}

NEEDS_TORCHVISION = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="vLLM imports torchvision to build the model"
)


def models(names: Iterable[str]) -> list[Any]:
    """PaliGemma needs no torchvision."""
    return [
        pytest.param(name, marks=[] if name == "PaliGemma" else NEEDS_TORCHVISION) for name in names
    ]


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """vLLM makes up weights that make attention matter, and inspects classes in this process."""
    monkeypatch.setattr(DummyModelLoader, "load_weights", random_weights)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.mark.parametrize("name", models(NOT_CAUSAL))
@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({}, "with --language-model-only, or"),
        (
            {"language_model_only": True, "enable_mm_embeds": True},
            "with --language-model-only and without --enable-mm-embeds, or",
        ),
    ],
)
def test_images_whose_tokens_attend_to_later_ones_are_refused(
    name, options, cure, tmp_path, monkeypatch
):
    def read(*arguments):
        raise AssertionError("weights were read before the refusal")

    monkeypatch.setattr(DummyModelLoader, "load_weights", read)
    write, _ = NOT_CAUSAL[name]
    with (
        pytest.raises(Exception, match=f"not causal.*{cure} choose another --attention-backend"),
        engine(write(tmp_path), **OPTIONS | options),
    ):
        pass


@pytest.mark.parametrize("name", models(NOT_CAUSAL))
def test_the_cure_serves_text_alone(name, tmp_path):
    write, decoder = NOT_CAUSAL[name]
    model, family = write(tmp_path), FAMILIES[decoder]
    options: dict[str, Any] = {**OPTIONS, "language_model_only": True}
    prompts = random_prompts([5, 130, 280])
    with engine(model, backend=DENSE, **options) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, quest=QUEST, **options) as llm:
        assert agree(dense, answers(llm, prompts, COVERING))
        assert stats(llm).sparse_rows == 0
        token_ids(llm, prompts, greedy(NUM_TOKENS))
        small = stats(llm)
    rows = 2 * (NUM_TOKENS - 1)  # of the prompts that exceed the budget
    assert small.sparse_rows == rows * family.sparse_layers * family.config["num_key_value_heads"]


def pictures() -> list[Image.Image]:
    """Noise and black."""
    size = (IMAGE_PIXELS, IMAGE_PIXELS)
    noise = torch.rand(*size, 3, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray((255 * noise).byte().numpy()), Image.new("RGB", size)]


@pytest.mark.parametrize("name", models(CAUSAL))
def test_a_causal_decoder_reads_images(name, tmp_path: Path):
    """Prompts with an image and one without, in a batch."""
    write, placeholder = CAUSAL[name]
    model = write(tmp_path)
    alone, before, after = (
        as_text(prompt["prompt_token_ids"]) for prompt in random_prompts([130, 100, 60])
    )
    prompts: list[Any] = [alone]
    for picture in pictures():
        with_image = {"prompt": f"{before} {placeholder} {after}"}
        prompts.append(with_image | {"multi_modal_data": {"image": picture}})
    options: dict[str, Any] = {**OPTIONS, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    with engine(model, backend=DENSE, **options) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    assert dense[1] != dense[2], "the image decides nothing"
    with engine(model, quest=QUEST, **options) as llm, check_operators() as checked:
        assert agree(dense, answers(llm, prompts, COVERING))
        assert stats(llm).sparse_rows == 0
        token_ids(llm, prompts, greedy(NUM_TOKENS))
        small = stats(llm)
        vllm_config = llm.llm_engine.vllm_config
        num_kv_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    rows, sparse_layers = len(prompts) * (NUM_TOKENS - 1), 2
    assert small.sparse_rows == rows * sparse_layers * num_kv_heads
    assert checked.decodes > 0
