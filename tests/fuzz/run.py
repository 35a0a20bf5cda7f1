"""Runs a case: an engine under its waves with every row checked, and again each request alone."""

import contextlib
import importlib
import itertools
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import engines
from engines import ON_GPU, engine, wake

from . import models
from .cases import Case, EngineCase, RequestCase, Wave
from .checker import Totals
from .graphs import tapped
from .hooks import start_checks, stop_checks, take_report
from .mended import mended
from .roundings import spread_of_lead

TESTS = Path(__file__).parents[1]
STUCK_STEPS = 400
"""Steps without a token after which requests are taken for lost."""

NEAR_TIE_OF_PAGES = 1e-5
"""A lead of a page over another, relative to the largest score, that fp32 may undo: some roundings
of each layer before it."""


CALM = ("guessable", "demo")
"""Models whose leads 16 bits move by less, see `eagle.CALM`; the bundled model was trained."""

NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}


@dataclass
class Answer:
    """What an engine said to a request."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...] = ()
    """Of each token's log probability over the next, where they were asked for."""

    finished: bool = True


@dataclass
class Outcome:
    """What a wave, or a whole run, showed."""

    totals: Totals = field(default_factory=Totals)
    faults: list[str] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    leads: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By request, as `checker.Checker.leads`."""

    resumed: dict[str, int] = field(default_factory=dict)
    """By request that started anew: the tokens of its answer before."""

    compared: int = 0
    """Answers compared with those of the same requests alone."""

    excused: int = 0
    """Of these, those that differ behind a near tie."""

    tokens: int = 0

    def add(self, other: "Outcome") -> None:
        """Take another's in."""
        self.totals += other.totals
        self.faults += other.faults
        self.answers |= other.answers
        self.leads |= other.leads
        self.resumed |= other.resumed
        self.compared += other.compared
        self.excused += other.excused
        self.tokens += other.tokens


def prompt_tokens(request: RequestCase, vocabulary: int) -> list[int]:
    """A request's prompt."""
    shared = random.Random(f"prefix {request.prefix}")
    own = random.Random(f"own {request.own}")
    return [
        rng.randrange(3, vocabulary)
        for rng, count in ((shared, request.num_shared), (own, request.num_own))
        for _ in range(count)
    ]


def sampling(request: RequestCase, *, alone: bool = False) -> SamplingParams:
    """A request's parameters; those of a request alone ask for two log probabilities."""
    more = dict(request.more)
    if "structured_outputs" in more:
        more["structured_outputs"] = StructuredOutputsParams(**more["structured_outputs"])
    if alone:
        more["logprobs"] = 2
        more.pop("prompt_logprobs", None)
    extra = None if request.budget is None else {"quest_token_budget": request.budget}
    return SamplingParams(
        temperature=0.0 if request.is_greedy else 1.0,
        max_tokens=request.num_answer,
        ignore_eos=True,
        extra_args=extra,
        **more,
    )


@contextlib.contextmanager
def running(
    case: EngineCase,
    folder: Path,
    *,
    backend: str = "QUEST",
    is_checked: bool = True,
    **changes: Any,
) -> Iterator[LLM]:
    """An engine of a case, with every row of QUEST's checked unless it should not be."""
    options = case.options | changes
    is_checked &= backend == "QUEST"
    model = models.write(case.model, folder, is_fp8=options.get("kv_cache_dtype") == "auto")
    if case.speculation == "ngram":
        options["speculative_config"] = NGRAM | {"num_speculative_tokens": 3}
    elif case.speculation:
        head = {"method": "eagle", "model": models.write_head(folder)}
        if case.speculation == "eagle by QUEST":  # which on the V1 runner must be named
            head["attention_backend"] = backend
        options["speculative_config"] = head | {"num_speculative_tokens": 3}
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**case.environment, "PYTHONPATH": os.pathsep.join(paths)}
    if options.get("tensor_parallel_size", 1) > 1 and not ON_GPU:
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    with contextlib.ExitStack() as stack:
        if ON_GPU:
            stack.callback(torch.cuda.empty_cache)
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(models.loadable())
        stack.enter_context(mended())
        if case.speculation and not ON_GPU:
            # vLLM 0.32 trips over an attribute of this module once a CPU engine has speculated
            # (vllm/triton_utils/dispatcher.py, line 139): hide it from vLLM's scan, for good.
            importlib.import_module("numba")
            sys.modules.pop("llvmlite.binding.ffi", None)
        if is_checked and options.get("enforce_eager") is False:
            stack.enter_context(tapped())
        llm = stack.enter_context(engine(model, backend, case.quest, **options))
        if is_checked:
            llm.collective_rpc(start_checks)
            if options.get("tensor_parallel_size", 1) == 1:  # else workers' processes end
                stack.callback(llm.collective_rpc, stop_checks)
        yield llm


def name_of(request_id: str, names: set[str]) -> str:
    """The request that vLLM calls `0_w1r2-81a7f3`."""
    return request_id.rpartition("_")[2].partition("-")[0] if names else request_id


def run_wave(
    llm: LLM,
    wave: Wave,
    vocabulary: int,
    *,
    alone: bool = False,
    is_checked: bool = True,
    until: float = math.inf,
) -> Outcome:
    """Send a wave, step the engine until all requests have ended, and look at what was found.

    At the time `until` the rest is cancelled.
    """
    outcome, server = Outcome(), llm.llm_engine
    if wave.sleeps:
        llm.sleep(level=wave.sleeps)
        wake(llm, wave.sleeps)
    waiting = sorted(wave.requests, key=lambda request: request.arrives)
    cancels = {
        request.name: request.arrives + request.cancelled
        for request in waiting
        if request.cancelled is not None
    }
    sent: dict[str, RequestCase] = {}
    done: dict[str, dict[int, Any]] = {}  # by index of the answer; empty where cancelled
    parts: dict[str, dict[int, Any]] = {}
    embeddings = None
    last_progress = step = 0
    resets = dict(wave.resets)
    for step in itertools.count():
        while waiting and (waiting[0].arrives <= step or not server.has_unfinished_requests()):
            request = waiting.pop(0)
            tokens = prompt_tokens(request, vocabulary)
            prompt: Any = {"prompt_token_ids": tokens}
            if request.is_embedded:
                if embeddings is None:
                    model = llm.llm_engine.model_config
                    embeddings = models.embeddings(model.model, model.dtype)
                prompt = {"prompt_embeds": embeddings[tokens]}
            parameters = sampling(request, alone=alone)
            server.add_request(request.name, prompt, parameters, priority=request.priority)
            sent[request.name] = request
            last_progress = step
        for name in [name for name, at in cancels.items() if at <= step and name in sent]:
            del cancels[name]
            if name not in done:
                server.abort_request([name])
                done[name] = {}
        if time.monotonic() > until:
            waiting.clear()
            left = [name for name in sent if name not in done]
            server.abort_request(left)
            done |= {name: {} for name in left}
        if step in resets:
            server.reset_prefix_cache(reset_running_requests=resets[step])
        if not server.has_unfinished_requests():
            if not waiting:
                break
            continue
        for output in server.step():
            last_progress = step
            own = parts.setdefault(output.request_id, {})
            own |= {each.index: each for each in output.outputs}
            if output.finished:
                done[output.request_id] = own
        if step - last_progress > STUCK_STEPS:
            names = sorted(sent.keys() - done.keys())
            outcome.faults.append(f"no token in {STUCK_STEPS} steps; {names} have not ended")
            server.abort_request(names)
            break
    for name, own in done.items():
        if own:
            outcome.answers[name] = [_answer(own[index]) for index in sorted(own)]
            outcome.faults += _lost_tokens(sent[name], outcome.answers[name])
            outcome.tokens += sum(len(answer.tokens) for answer in outcome.answers[name])
    for name in sent.keys() - done.keys():
        outcome.faults.append(f"{name} was lost")
    for report in llm.collective_rpc(take_report) if is_checked and not alone else ():
        outcome.totals += Totals(**report["totals"])
        outcome.faults += report["faults"]
        for request_id, leads in report["leads"].items():
            outcome.leads.setdefault(name_of(request_id, set(sent)), []).extend(leads)
        for request_id, tokens in report["resumed"].items():
            outcome.resumed[name_of(request_id, set(sent))] = tokens
    return outcome


def _answer(output: Any) -> Answer:
    leads = []
    for logprobs in output.logprobs or ():
        ordered = sorted((entry.logprob for entry in logprobs.values()), reverse=True)
        leads.append(ordered[0] - ordered[1] if len(ordered) > 1 else 0.0)
    return Answer(tuple(output.token_ids), tuple(leads))


def _lost_tokens(request: RequestCase, answers: list[Answer]) -> list[str]:
    """Answers that ended early without a reason."""
    if "stop" in request.more or "structured_outputs" in request.more:
        return []
    lengths = [len(answer.tokens) for answer in answers]
    expected = [request.num_answer] * request.more.get("n", 1)
    return [] if lengths == expected else [f"{request}: {lengths} tokens, not {expected}"]


def may_be_sparse(case: EngineCase, request: RequestCase) -> bool:
    """Whether a request's budget is less than the longest context."""
    budget = case.quest["token_budget"] if request.budget is None else request.budget
    return bool(0 <= budget < case.options["max_model_len"])


def in_16_bits(case: EngineCase) -> bool:
    """Whether the model computes in fp16 or bf16."""
    return bool(case.options.get("dtype", "bfloat16" if ON_GPU else "float32") != "float32")


def comparable(case: EngineCase, request: RequestCase) -> bool:
    """Whether a request's tokens do not depend on what shares its batches.

    16 bits round other batches differently: other pages become the best, and other tokens in models
    that are not `CALM`. FLASH_ATTN rounds the weights of prefill to fp8 with such a cache, in other
    ways for other chunks.
    """
    is_steady = request.is_greedy and request.cancelled is None
    if not in_16_bits(case):
        return is_steady
    is_calm = case.model in CALM and "kv_cache_dtype" not in case.options
    return is_steady and is_calm and not may_be_sparse(case, request)


def compare_alone(
    case: EngineCase,
    requests: list[RequestCase],
    busy: Outcome,
    folder: Path,
    seconds: float,
    backend: str = "QUEST",
) -> Outcome:
    """Compare the busy engine's answers with those to requests sent one at a time to a calm one.

    Requests whose tokens can be compared, the newest first, for so many seconds.
    """
    chosen = [
        request
        for request in reversed(requests)
        if request.name in busy.answers and comparable(case, request)
    ]
    if not chosen:
        return Outcome()
    outcome = Outcome()
    calm = EngineCase(case.model, case.quest, case.options, "", case.environment)
    changes = {
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(512, case.options["max_num_batched_tokens"]),
        "num_gpu_blocks_override": None,
        "scheduling_policy": "fcfs",
        "tensor_parallel_size": 1,
        "async_scheduling": None,
        "enforce_eager": True,
        "compilation_config": {},
        "enable_prompt_embeds": False,
        "enable_sleep_mode": False,
    }
    vocabulary = models.vocabulary(case.model)
    with running(calm, folder, backend=backend, is_checked=False, **changes) as llm:
        deadline = time.monotonic() + seconds
        for request in chosen:
            if time.monotonic() > deadline:
                break
            values = vars(request) | {"arrives": 0, "is_embedded": False, "priority": 0}
            alone = run_wave(llm, Wave((RequestCase(**values),)), vocabulary, alone=True)
            outcome.faults += alone.faults
            if request.name in alone.answers:
                _compare(case, request, alone, busy, outcome, llm)
    return outcome


def _compare(
    case: EngineCase,
    request: RequestCase,
    alone: Outcome,
    busy: Outcome,
    outcome: Outcome,
    calm: LLM,
) -> None:
    name = request.name
    [expected], found = alone.answers[name], busy.answers[name][0]
    outcome.compared += 1
    count = min(len(expected.tokens), len(found.tokens))
    if name in busy.resumed and may_be_sparse(case, request):
        # A request that starts anew reads its own answer as prefill does, in full.
        count = min(count, busy.resumed[name])
    differ = [i for i in range(count) if expected.tokens[i] != found.tokens[i]]
    if not differ:
        return
    first = differ[0]
    seq_len = request.num_shared + request.num_own + first
    near = [
        lead for at, lead in busy.leads.get(name, ()) if at <= seq_len and lead < NEAR_TIE_OF_PAGES
    ]
    lead = expected.leads[first]
    if lead < engines.NEAR_TIE or near:
        outcome.excused += 1
        return
    fault = (
        f"{request}: token {first} of its answer is {found.tokens[first]}, alone "
        f"{expected.tokens[first]} with a lead of {lead:.3g}"
    )
    if in_16_bits(case):
        tokens = prompt_tokens(request, models.vocabulary(case.model))
        pair = expected.tokens[first], found.tokens[first]
        spread = spread_of_lead(calm, [*tokens, *expected.tokens[:first]], *pair)
        if lead < spread:
            outcome.excused += 1
            return
        fault += f", which roundings move by {spread:.3g}"
    outcome.faults.append(fault)


def run_case(
    case: Case, folder: Path, alone_seconds: float = 30.0, backend: str = "QUEST"
) -> Outcome:
    """All of a case; faults of any kind end it. With no seconds, requests are not sent alone."""
    outcome = Outcome()
    vocabulary = models.vocabulary(case.engine.model)
    is_checked = backend == "QUEST"
    try:
        with running(case.engine, folder, backend=backend) as llm:
            for wave in case.waves:
                outcome.add(run_wave(llm, wave, vocabulary, is_checked=is_checked))
                if outcome.faults:
                    return outcome
        requests = [request for wave in case.waves for request in wave.requests]
        if alone_seconds:
            alone = compare_alone(case.engine, requests, outcome, folder, alone_seconds, backend)
            outcome.add(alone)
    except Exception:
        outcome.faults.append(traceback.format_exc()[-3000:])
    return outcome
