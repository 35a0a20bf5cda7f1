"""Methods that run over Hugging Face transformers: H2O and TOVA, with QUEST and full attention to
compare with.

The procedure is that of Quest's evaluation (arXiv 2406.10774, section 4): the material is read
densely; then H2O and TOVA cut what they keep down to the budget, by the attention seen while
reading, and drop tokens at every step from then on; the question is fed token by token, and the
answer is greedy. `layer_caches` has the methods.

`quest-hf` follows the plain loops of `vllm_quest.reference`: to compare with vLLM, not for speed.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.accuracy.interface import Answer, Prompt, ignore, quest_settings
from benchmarks.accuracy.layer_caches import (
    Cache,
    FullCache,
    H2OCache,
    QuestCache,
    ReadText,
    Texts,
    TovaCache,
    read_densely,
)
from vllm_quest.config import UNLIMITED, QuestConfig, Score

METHODS = ("h2o", "tova", "quest-hf", "full-hf")
ATTENTION = "vllm_quest_accuracy"
"""The name of this module's attention in transformers."""
MAX_ROWS = 32
"""Questions that are answered at once."""
MAX_MATERIAL_BYTES = 2**33
"""Keys and values of texts beyond which no further one is kept."""

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
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Hand a layer's attention to the run; as transformers calls it.

    Raises:
        NotImplementedError: the model's attention has a window, a soft cap or sinks.
    """
    if any(value is not None for value in (sliding_window, softcap, s_aux)):
        raise NotImplementedError("sliding windows, soft caps and sinks are not implemented here")
    out = layer_attention(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class Reading:
    """Attention while the material is read, and what it leaves."""

    summed_layers: Container[int]
    """Layers in which the attention that each token gets is summed up."""

    layers: list[ReadText] = field(default_factory=list)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        sum_received = layer in self.summed_layers
        text, out = read_densely(query[0], key[0], value[0], scale, sum_received=sum_received)
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

    layers: list[ReadText]
    logits: Tensor  # [1, vocabulary], of what comes next

    @property
    def num_bytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)


@dataclass(frozen=True)
class Batch:
    """Prompts that run together: one budget, questions of one length."""

    numbers: list[int]
    """The prompts' places in the order of the answers."""

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
        options: dict[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
            model: a folder or the name of a checkpoint.
            dense_layers: layers at the front that attend in full under every method.
            score: QUEST's, see `QuestConfig`.
            max_model_len: the longest prompt with its answer, in tokens.
            options: as `VllmEngine` takes them; read is QUEST's part alone, for `quest-hf`.
            device: by default the GPU where there is one.
        """
        self._name = model
        self._dense_layers = dense_layers
        self._quest = QuestConfig.from_settings(quest_settings(options or {}, score))
        self._max_model_len = max_model_len
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = None

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
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Prompt],
        method: str,
        token_budgets: Sequence[int],
        progress: Callable[[int], object] = ignore,
        answered: Callable[[int, Answer], object] = ignore,
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
        by_material: dict[tuple[int, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_material.setdefault(prompt.material, []).append(number)
        answers: dict[int, Answer] = {}
        materials: dict[tuple[int, ...], Material] = {}
        for tokens in by_material:
            materials[tokens] = self._read(tokens, method)
            progress(len(tokens))
            is_last = len(answers) + sum(len(by_material[t]) for t in materials) == len(prompts)
            if is_last or sum(m.num_bytes for m in materials.values()) > MAX_MATERIAL_BYTES:
                numbers = [number for read in materials for number in by_material[read]]
                for batch in batches(prompts, token_budgets, numbers, method):
                    found = self._answer(batch, materials, method, progress)
                    for number, answer in zip(batch.numbers, found, strict=True):
                        answers[number] = answer
                        answered(number, answer)
                materials.clear()
        return [answers[number] for number in range(len(prompts))]

    def _read(self, tokens: tuple[int, ...], method: str) -> Material:
        """Read a text densely."""
        num_layers = self._model.config.num_hidden_layers
        reading = Reading(range(self._dense_layers, num_layers) if method == "h2o" else ())
        positions = torch.arange(len(tokens), device=self._device)
        logits = self._forward(
            torch.tensor([tokens], device=self._device), positions[None], reading
        )
        return Material(reading.layers, logits)

    def _answer(
        self,
        batch: Batch,
        materials: dict[tuple[int, ...], Material],
        method: str,
        progress: Callable[[int], object],
    ) -> list[Answer]:
        num_rows, first = len(batch.prompts), batch.prompts[0]
        own = [materials[prompt.material] for prompt in batch.prompts]
        questions = torch.tensor(
            [prompt.question for prompt in batch.prompts], dtype=torch.int64, device=self._device
        )  # [rows, question_tokens]
        num_steps = questions.shape[1] + first.max_answer_tokens
        decoding = Decoding(
            [
                self._cache(texts, layer, method, batch.token_budget, num_steps)
                for layer, texts in enumerate(zip(*(m.layers for m in own), strict=True))
            ]
        )
        logits = torch.cat([material.logits for material in own])
        positions = torch.tensor(
            [[len(prompt.material)] for prompt in batch.prompts], device=self._device
        )
        # Filled where they are: a step of the question does not wait for the device.
        logprobs = torch.empty(questions.shape, device=self._device)
        hits = torch.empty(questions.shape, dtype=torch.bool, device=self._device)
        most_probable = torch.empty_like(questions)
        answers: list[list[int]] = [[] for _ in batch.prompts]
        has_ended = [False] * num_rows
        for step in range(num_steps):
            if step < questions.shape[1]:
                tokens = questions[:, step]
                own_logits = logits.gather(1, tokens[:, None])
                logprobs[:, step] = own_logits[:, 0] - logits.logsumexp(-1)
                hits[:, step] = (logits >= own_logits).sum(-1) == 1
                most_probable[:, step] = logits.argmax(-1)
            else:
                tokens = logits.argmax(-1)
                for row, token in enumerate(tokens.tolist()):
                    has_ended[row] |= token in self._ends
                    if not has_ended[row]:
                        answers[row].append(token)
            if all(has_ended) or step == num_steps - 1:
                progress(num_rows * (num_steps - step))
                break
            progress(num_rows)
            logits = self._forward(tokens[:, None], positions + step, decoding)
        columns = (logprobs.tolist(), hits.tolist(), most_probable.tolist())
        rows = zip(answers, *columns, strict=True)
        return [Answer(*map(tuple, row)) for row in rows]

    def _cache(
        self, texts: Texts, layer: int, method: str, token_budget: int, num_steps: int
    ) -> Cache:
        if layer < self._dense_layers or token_budget == UNLIMITED or method == "full-hf":
            return FullCache(texts)
        if method == "quest-hf":
            return QuestCache(texts[0], len(texts), token_budget, num_steps, self._quest)
        kind = {"h2o": H2OCache, "tova": TovaCache}[method]
        return kind(texts, token_budget)

    def _forward(
        self, tokens: Tensor, positions: Tensor, layer_attention: LayerAttention
    ) -> Tensor:
        """fp32 logits after the last of `[rows, n]` tokens, `[rows, vocabulary]`."""
        output = self._model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
            layer_attention=layer_attention,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def batches(
    prompts: Sequence[Prompt], token_budgets: Sequence[int], numbers: Sequence[int], method: str
) -> Iterator[Batch]:
    """Prompts that can run together, of those with these numbers."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number in numbers:
        prompt, budget = prompts[number], int(token_budgets[number])
        num_kept = (
            len(prompt.material) if budget == UNLIMITED else min(len(prompt.material), budget)
        )
        # QUEST's pages hold one text.
        shared = prompt.material if method == "quest-hf" else num_kept
        key = (budget, len(prompt.question), prompt.max_answer_tokens, shared)
        alike.setdefault(key, []).append(number)
    for (budget, *_), together in alike.items():
        for first in range(0, len(together), MAX_ROWS):
            chosen = together[first : first + MAX_ROWS]
            yield Batch(chosen, [prompts[number] for number in chosen], budget)
