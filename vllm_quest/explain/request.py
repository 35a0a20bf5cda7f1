"""Runs one request through vLLM with QUEST, and tells what its decode steps read."""

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_quest import layout
from vllm_quest.config import UNLIMITED, QuestConfig
from vllm_quest.explain.recording import LayerRecord, Recorder

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import ModelConfig

SPARE_TOKENS = 1024
"""Room in the KV cache beyond the request, for blocks that are partly filled."""

MAX_PLACES = 8
"""An answer that stands in more places than this, such as `yes`, says nothing: none is marked."""


class CannotExplain(Exception):
    """There is nothing to run or nothing to see; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What is asked of which model."""

    model: str
    prompt: str
    quest: QuestConfig
    max_tokens: int
    is_chat: bool = False
    """Whether the prompt is a user's message, to be put into the model's chat template."""

    ignore_eos: bool = False
    """Whether to go on past the answer's end."""

    expected: str | None = None
    """The text that the answer lies in, to be found in the prompt; None: what the model answers."""

    layers: list[int] | None = None
    heads: list[int] | None = None
    """Layers and KV heads to look at; None for all."""


@dataclass(frozen=True)
class Explanation:
    """What the decode steps of one request read."""

    request: Request
    prompt_tokens: int
    answer: str
    fed_tokens: list[str]
    """The token that each decode step took in: the answer's, but for the last."""

    places: list[tuple[int, int]]
    """Where the answer lies in the prompt: first token, and one past the last."""

    heads: list[int]
    """KV heads recorded."""

    layers: dict[int, LayerRecord | str]
    """By number: what was read, or why all of it was (`dense`, `sliding window`)."""

    @property
    def records(self) -> dict[int, LayerRecord]:
        """The sparse layers alone."""
        return {n: layer for n, layer in self.layers.items() if isinstance(layer, LayerRecord)}


def explain(request: Request) -> Explanation:
    """Run the request, greedily, in an engine of its own in this process.

    `VLLM_ENABLE_V1_MULTIPROCESSING=0` must be set before vLLM is imported.

    Raises:
        CannotExplain: the model cannot be loaded, or QUEST would read everything.
    """
    from vllm import TokensPrompt

    model = _model_config(request)
    prompt_ids, offsets, text = _tokenize(request)
    num_prompt = len(prompt_ids)
    _check_lengths(request, num_prompt, model.max_model_len)
    _check_expected(request, text)
    llm = _start(request, model, num_prompt + request.max_tokens)
    try:
        layers, heads = _choose(request, llm)
        names = {name: number for number, (name, _) in enumerate(_attention_layers(llm))}
        recorder = Recorder(
            num_prompt, {n: number for n, number in names.items() if number in layers}
        )
        with recorder.recording():
            prompt = TokensPrompt(prompt_token_ids=prompt_ids)
            (result,) = llm.generate(prompt, _sampling(request), use_tqdm=False)
        reasons = {layer: _why_dense(llm, layer) for layer in layers}
        tokenizer = llm.get_tokenizer()
    finally:
        llm.llm_engine.engine_core.shutdown()

    output = result.outputs[0]
    num_steps = len(output.token_ids) - 1  # the first token comes from the prefill
    if num_steps < 1:
        raise CannotExplain(
            "the model answered with one token, which comes from the prefill, so no decode step "
            "read anything; choose a prompt with a longer answer, or --ignore-eos"
        )
    records = recorder.records(num_steps)
    return Explanation(
        request=request,
        prompt_tokens=num_prompt,
        answer=output.text.strip(),
        fed_tokens=[tokenizer.decode([token]) for token in output.token_ids[:num_steps]],
        places=_places(request, output.text.strip(), text, offsets),
        heads=heads,
        layers={
            layer: records[layer].of_heads(heads) if layer in records else reasons[layer]
            for layer in layers
        },
    )


def _model_config(request: Request) -> "ModelConfig":
    from vllm.engine.arg_utils import EngineArgs

    try:
        return EngineArgs(model=request.model).create_model_config()
    except (ValueError, OSError) as error:
        reason = _one_line(error)
        raise CannotExplain(f"the model {request.model!r} cannot be loaded: {reason}") from error


def _tokenize(request: Request) -> tuple[list[int], list[tuple[int, int]], str]:
    """Token ids, the characters that each covers (none if the tokenizer cannot say), the text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(request.model)
    text = request.prompt
    if request.is_chat:
        if tokenizer.chat_template is None:
            raise CannotExplain("the model has no chat template; leave out --chat")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(
        text,
        add_special_tokens=not request.is_chat,  # a chat template brings its own
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    return encoded["input_ids"], encoded.get("offset_mapping", []), text


def _check_lengths(request: Request, num_prompt: int, model_limit: int) -> None:
    if num_prompt + request.max_tokens > model_limit:
        raise CannotExplain(
            f"the prompt has {num_prompt} tokens; with --max-tokens {request.max_tokens} that is "
            f"more than the model's {model_limit}: shorten one of them"
        )
    quest = request.quest
    if quest.token_budget == UNLIMITED:
        raise CannotExplain("a token budget of -1 is full attention: nothing to explain")
    if quest.pages(num_prompt + 1) <= quest.pages(quest.token_budget):
        raise CannotExplain(
            f"the prompt's {num_prompt} tokens fit the token budget of {quest.token_budget}, so "
            "QUEST reads all of them: nothing to explain; lower --token-budget or give a longer "
            "prompt"
        )


def _check_expected(request: Request, text: str) -> None:
    if request.expected is not None and request.expected not in text:
        raise CannotExplain(f"--answer {request.expected!r} does not occur in the prompt")


def _start(request: Request, model: "ModelConfig", num_tokens: int) -> "LLM":
    from vllm import LLM

    token_bytes = (
        2 * model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
    ) * model.get_total_num_hidden_layers()
    unit_tokens, unit_rows = layout.unit(request.quest.page_size, request.quest.score)
    with_bounds = token_bytes * (unit_tokens + unit_rows) // unit_tokens
    try:
        return LLM(
            request.model,
            attention_backend="QUEST",
            additional_config={"quest": dataclasses.asdict(request.quest)},
            max_model_len=num_tokens,
            max_num_seqs=1,
            # No graphs, no cached prefixes, no second request: every row is this request's.
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=with_bounds * (num_tokens + SPARE_TOKENS),
            # Sizes nothing beside the line above; vLLM would refuse to start on a GPU in use.
            gpu_memory_utilization=0.01,
        )
    except ValueError as error:
        raise CannotExplain(_one_line(error)) from error


def _choose(request: Request, llm: "LLM") -> tuple[list[int], list[int]]:
    """The layers and KV heads to look at."""
    attention = _attention_layers(llm)
    layers = _within(request.layers, list(range(len(attention))), "--layers", "layers")
    if all(_why_dense(llm, layer) for layer in layers):
        dense = request.quest.dense_layers
        raise CannotExplain(
            f"every layer chosen is dense or has a sliding window (--dense-layers is {dense}), so "
            "all of them read everything: lower --dense-layers or choose other --layers"
        )
    num_heads = min(layer.num_kv_heads for _, layer in attention)
    return layers, _within(request.heads, list(range(num_heads)), "--heads", "KV heads")


def _within(chosen: list[int] | None, present: list[int], option: str, things: str) -> list[int]:
    if chosen is None:
        return present
    for number in chosen:
        if number not in present:
            raise CannotExplain(
                f"{option} names {number}; the model's {things} are {present[0]} to {present[-1]}"
            )
    return chosen


def _attention_layers(llm: "LLM") -> list[tuple[str, Any]]:
    """The attention layers by name, in the model's order, windowed ones among them."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return list(get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).items())


def _why_dense(llm: "LLM", number: int) -> str:
    """Why a layer reads everything; empty if it does not."""
    from vllm_quest.layers import dense_layer_names, is_full_attention

    vllm_config = llm.llm_engine.vllm_config
    name, layer = _attention_layers(llm)[number]
    if not is_full_attention(layer):
        return "sliding window"
    quest = QuestConfig.from_vllm(vllm_config)
    return "dense" if name in dense_layer_names(vllm_config, quest.dense_layers) else ""


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos
    )


def _places(
    request: Request, answer: str, text: str, offsets: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Where the text expected, or else the answer, lies in the prompt."""
    if request.expected is not None:
        return find(request.expected, text, offsets)
    places = find(answer, text, offsets)
    return places if len(places) <= MAX_PLACES else []


def find(wanted: str, text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The token ranges of a text's occurrences, first and one past the last.

    Args:
        wanted: the text to look for.
        text: what was tokenized.
        offsets: the characters that each token covers, start and end.
    """
    if not wanted or not offsets:
        return []
    starts, ends = np.array(offsets).T
    places = []
    for match in re.finditer(re.escape(wanted), text):
        tokens = np.flatnonzero((starts < match.end()) & (ends > match.start()))
        places.append((int(tokens[0]), int(tokens[-1]) + 1))
    return places


def _one_line(error: Exception) -> str:
    """The first sentence of an error that says something; pydantic puts a header above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("Value error, ")]
    line = told[0].removeprefix("Value error, ") if told else lines[0]
    return re.sub(r" \[type=.*", "", line)
