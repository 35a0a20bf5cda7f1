"""Makes a failing case small: fewer waves, fewer requests, shorter ones, plainer engines."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .cases import Case, RequestCase, Wave

PLAINER: list[dict[str, Any]] = [
    {"scheduling_policy": "fcfs"},
    {"enable_prefix_caching": False},
    {"tensor_parallel_size": 1},
    {"enable_prompt_embeds": False},
]


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float) -> Case:
    """The smallest case found that still fails, in so many seconds."""
    deadline = time.monotonic() + seconds
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in candidates(case):
            if time.monotonic() > deadline:
                return case
            if fails(smaller):
                case, is_smaller = smaller, True
                break
    return case


def candidates(case: Case) -> Iterator[Case]:
    """Smaller cases, those first that leave out most."""
    count = len(case.waves)
    if count > 1:
        yield replace(case, waves=case.waves[-1:])
        yield replace(case, waves=case.waves[count // 2 :])
        for i in range(count):
            yield replace(case, waves=case.waves[:i] + case.waves[i + 1 :])
    for i, wave in enumerate(case.waves):
        for smaller in _smaller_waves(wave):
            yield replace(case, waves=(*case.waves[:i], smaller, *case.waves[i + 1 :]))
    for plainer in PLAINER:
        options = case.engine.options | plainer
        if any(case.engine.options.get(key, value) != value for key, value in plainer.items()):
            yield replace(case, engine=replace(case.engine, options=options))
    if case.engine.speculation:
        yield replace(case, engine=replace(case.engine, speculation=""))


def _smaller_waves(wave: Wave) -> Iterator[Wave]:
    requests, count = wave.requests, len(wave.requests)
    size = count // 2
    while size:
        for first in range(0, count, size):
            rest = requests[:first] + requests[first + size :]
            if rest:
                yield replace(wave, requests=rest)
        size //= 2
    if wave.resets:
        yield replace(wave, resets=())
    for i, request in enumerate(requests):
        for shorter in _shorter(request):
            yield replace(wave, requests=(*requests[:i], shorter, *requests[i + 1 :]))


def _shorter(request: RequestCase) -> Iterator[RequestCase]:
    if request.more:
        yield replace(request, more={})
    if request.num_answer > 1:
        yield replace(request, num_answer=request.num_answer // 2)
    if request.num_shared and request.num_own:
        yield replace(request, num_shared=0)
    if request.num_own > 1:
        yield replace(request, num_own=request.num_own // 2)
    if request.budget is not None:
        yield replace(request, budget=None)
    if request.arrives:
        yield replace(request, arrives=0)
    if request.is_embedded:
        yield replace(request, is_embedded=False)
