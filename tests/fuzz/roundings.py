"""How far 16-bit roundings move the lead of one token over another, measured in a calm engine.

Batches of other sizes have matrix products and attention sum in another order, and an output that
lay between two numbers of the model's dtype is rounded to the other one. What comes of that depends
on the model: a router chooses another expert, a sharp softmax another key. So a request is sent
again, up to the token in question, while every output of linear layers and of attention is moved by
at most one rounding.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from batch import UNIT_ROUNDOFF

NUM_RUNS = 16


class Disturbance:
    """Hooks in a worker's model, and what they know."""

    def __init__(self, worker: Any, seed: int) -> None:
        self.model = worker.model_runner.get_model()
        self.generator = torch.Generator(worker.device).manual_seed(seed)
        self.logits: Tensor | None = None  # [vocabulary], of the token computed last
        self.compute_logits = self.model.compute_logits
        self.model.compute_logits = self.keep_logits
        self.hooks = [
            module.register_forward_hook(self.move)
            for module in self.model.modules()
            if isinstance(module, (Attention, LinearBase))
        ]

    def move(self, module: Any, given: Any, result: Any) -> Any:
        """A module's output, each number moved by at most one rounding."""
        is_pair = isinstance(result, tuple)  # of linear layers: with the bias that is left to add
        output = result[0] if is_pair else result
        share = 2 * torch.rand(output.shape, generator=self.generator, device=output.device) - 1
        moved = (output.float() * (1 + UNIT_ROUNDOFF[output.dtype] * share)).to(output.dtype)
        return (moved, *result[1:]) if is_pair else moved

    def keep_logits(self, *args: Any, **named: Any) -> Any:
        """`compute_logits` of the model."""
        logits = self.compute_logits(*args, **named)
        self.logits = logits[-1].float()
        return logits

    def end(self) -> Tensor | None:
        """Leave the model as it was; returns the logits."""
        for hook in self.hooks:
            hook.remove()
        self.model.compute_logits = self.compute_logits
        return self.logits


def start_disturbance(worker: Any, seed: int) -> None:
    """Move the outputs of a worker's model from now on."""
    worker.disturbance = Disturbance(worker, seed)


def end_disturbance(worker: Any) -> Tensor | None:
    """Leave it as it was; returns the logits computed last, `[vocabulary]` fp32."""
    logits = worker.disturbance.end()
    del worker.disturbance
    return logits


def spread_of_lead(llm: LLM, tokens: list[int], expected: int, found: int) -> float:
    """By how much the lead of one token over another differs among NUM_RUNS runs.

    Args:
        llm: a calm engine, in this process, of one worker.
        tokens: a prompt, and its answer up to the token in question: all are read as a prompt is,
            in full.
        expected: a token.
        found: another.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1)
    leads = []
    for seed in range(NUM_RUNS):
        llm.collective_rpc(start_disturbance, args=(seed,))
        llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
        [logits] = llm.collective_rpc(end_disturbance)
        leads.append(float(logits[expected] - logits[found]))
    return max(leads) - min(leads)
