"""Methods that run over Hugging Face transformers: H2O and TOVA, with QUEST and full attention to
compare with.

The procedure is that of Quest's evaluation (arXiv 2406.10774, section 4): the material is read
densely; then H2O and TOVA cut what they keep down to the budget, by the attention seen while
reading, and drop tokens at every step from then on; the question is fed token by token, and the
answer is greedy. `layer_caches` has the methods.

`quest-hf` follows the plain loops of `vllm_quest.reference`: to compare with vLLM, not for speed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.layer_caches import (
    Cache,
    FullCache,
    H2OCache,
    QuestCache,
    ReadText,
    TovaCache,
    read_densely,
)
from vllm_quest.config import UNLIMITED, Score

METHODS = ("h2o", "tova", "quest-hf", "full-hf")
ATTENTION = "vllm_quest_accuracy"
"""The name of this module's attention in transformers."""
MAX_ROWS = 32
"""Questions about one text that are answered at once."""

LayerAttention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, query, key, value, scale) -> output; all but the scale `[rows, heads, tokens, d]`."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_attention: LayerAttention,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Hand a layer's attention to the run; as transformers calls it.

    Raises:
        NotImplementedError: the model's attention has a window or a soft cap.
    """
    if sliding_window is not None or softcap is not None:
        raise NotImplementedError("sliding windows and soft caps are not implemented here")
    out = layer_attention(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class Reading:
    """Attention while the material is read, and what it leaves."""

    sum_received: bool
    layers: list[ReadText] = field(default_factory=list)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        text, out = read_densely(query[0], key[0], value[0], scale, sum_received=self.sum_received)
        self.layers.append(text)
        return out[None]


@dataclass(frozen=True)
class Decoding:
    """Attention of one token per row to what the layers keep."""

    caches: list[Cache]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        out = self.caches[layer].attend(query[:, :, 0], key[:, :, 0], value[:, :, 0], scale)
        return out[:, :, None]


@dataclass(frozen=True)
class Material:
    """A text that was read."""

    tokens: tuple[int, ...]
    layers: list[ReadText]
    logits: Tensor  # [1, vocabulary], of what comes next

    @property
    def has_received(self) -> bool:
        return self.layers[0].received is not None


@dataclass(frozen=True)
class Batch:
    """Prompts that run together: one material, one budget, questions of one length."""

    prompts: list[Prompt]
    token_budget: int


class TransformersEngine:
    """A Hugging Face model, in fp32 on the CPU, in the checkpoint's type on a GPU."""

    def __init__(
        self,
        model: str,
        *,
        dense_layers: int,
        score: Score = "minmax",
        max_model_len: int,
        device: str | None = None,
    ) -> None:
        """
        Args:
            model: a folder or the name of a checkpoint.
            dense_layers: layers at the front that attend in full under every method.
            score: QUEST's, see `QuestConfig`.
            max_model_len: the longest prompt with its answer, in tokens.
            device: by default the GPU where there is one.
        """
        self._name = model
        self._dense_layers = dense_layers
        self._score = score
        self._max_model_len = max_model_len
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = None
        self._material: Material | None = None

    def __enter__(self) -> Self:
        dtype = torch.float32 if self._device.type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(
            self._name, dtype=dtype, attn_implementation=ATTENTION
        )
        self._model = model.to(self._device).eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model = self._material = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Prompt],
        method: str,
        token_budgets: Sequence[int],
        progress: Callable[[int], object],
    ) -> list[Answer]:
        """Answer prompts, in order; see `interface.Engine`.

        Raises:
            NotImplementedError: the model's attention is of a kind that is not implemented here.
            ValueError: an unknown method, or a prompt longer than `max_model_len`.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        for prompt in prompts:
            if prompt.num_tokens > self._max_model_len:
                raise ValueError(
                    f"a prompt with its answer has {prompt.num_tokens} tokens; max_model_len is "
                    f"{self._max_model_len}"
                )
        answers: list[Answer] = []
        for batch in batches(prompts, token_budgets):
            material = self._read(batch.prompts[0].material, sum_received=method == "h2o")
            answers += self._answer(batch, material, method)
            progress(len(batch.prompts))
        return answers

    def _read(self, tokens: tuple[int, ...], *, sum_received: bool) -> Material:
        """Read a text densely, or remember that it was the last one."""
        last = self._material
        if last and last.tokens == tokens and (last.has_received or not sum_received):
            return last
        self._material = None  # frees its memory first
        reading = Reading(sum_received)
        logits = self._forward(torch.tensor([tokens], device=self._device), 0, reading)
        self._material = Material(tokens, reading.layers, logits)
        return self._material

    def _answer(self, batch: Batch, material: Material, method: str) -> list[Answer]:
        num_rows, first = len(batch.prompts), batch.prompts[0]
        questions = torch.tensor(
            [prompt.question for prompt in batch.prompts], dtype=torch.int64, device=self._device
        )  # [rows, question_tokens]
        num_steps = questions.shape[1] + first.max_answer_tokens
        decoding = Decoding(
            [
                self._cache(text, layer, method, num_rows, batch.token_budget, num_steps)
                for layer, text in enumerate(material.layers)
            ]
        )
        logits = material.logits.expand(num_rows, -1)
        logprobs: list[list[float]] = [[] for _ in batch.prompts]
        answers: list[list[int]] = [[] for _ in batch.prompts]
        has_ended = [False] * num_rows
        for step in range(num_steps):
            if step < questions.shape[1]:
                tokens = questions[:, step]
                found = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                for row, logprob in enumerate(found.tolist()):
                    logprobs[row].append(logprob)
            else:
                tokens = logits.argmax(-1)
                for row, token in enumerate(tokens.tolist()):
                    has_ended[row] |= token in self._ends
                    if not has_ended[row]:
                        answers[row].append(token)
            if all(has_ended) or step == num_steps - 1:
                break
            logits = self._forward(tokens[:, None], len(material.tokens) + step, decoding)
        return [
            Answer(tuple(tokens), tuple(found))
            for tokens, found in zip(answers, logprobs, strict=True)
        ]

    def _cache(
        self,
        text: ReadText,
        layer: int,
        method: str,
        num_rows: int,
        token_budget: int,
        num_steps: int,
    ) -> Cache:
        if layer < self._dense_layers or token_budget == UNLIMITED or method == "full-hf":
            return FullCache(text, num_rows)
        if method == "quest-hf":
            return QuestCache(text, num_rows, token_budget, num_steps, self._score)
        kind = {"h2o": H2OCache, "tova": TovaCache}[method]
        return kind(text, num_rows, token_budget)

    def _forward(self, tokens: Tensor, position: int, layer_attention: LayerAttention) -> Tensor:
        """fp32 logits after the last of `[rows, n]` tokens, `[rows, vocabulary]`."""
        positions = torch.arange(position, position + tokens.shape[1], device=self._device)
        output = self._model(
            input_ids=tokens,
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=1,
            layer_attention=layer_attention,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def batches(prompts: Sequence[Prompt], token_budgets: Sequence[int]) -> Iterator[Batch]:
    """Neighbours that can run together, in order."""

    def alike(pair: tuple[Prompt, int]) -> tuple[object, ...]:
        prompt, budget = pair
        return prompt.material, len(prompt.question), prompt.max_answer_tokens, budget

    pairs = zip(prompts, token_budgets, strict=True)
    for (*_, budget), group in itertools.groupby(pairs, alike):
        together = [prompt for prompt, _ in group]
        for first in range(0, len(together), MAX_ROWS):
            yield Batch(together[first : first + MAX_ROWS], int(budget))
