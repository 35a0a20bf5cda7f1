"""What a run is made of: an engine's case, and the requests that it is sent. All of it is JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineCase:
    """An engine, drawn."""

    model: str
    """A name of `models.MODELS`."""

    quest: dict[str, Any]
    """Settings of QUEST."""

    options: dict[str, Any]
    """Options of vLLM."""

    speculation: str = ""
    """`ngram`, `eagle`, `eagle by QUEST`, or none."""

    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestCase:
    """A request, drawn: its prompt is a shared prefix and tokens of its own."""

    name: str
    arrives: int
    """The engine's step before which it is added, counted within its wave."""

    prefix: int
    """Which of the shared prefixes; they do not depend on the engine."""

    num_shared: int
    """Tokens of the prefix."""

    num_own: int
    """Tokens of its own."""

    own: int
    """What they are drawn from: requests with the same number have the same tokens."""

    num_answer: int
    """Tokens that are asked for."""

    budget: int | None = None
    """Tokens; None for the server's."""

    is_greedy: bool = True
    is_embedded: bool = False
    """Whether its prompt is sent as embeddings."""

    priority: int = 0
    cancelled: int | None = None
    """Steps after its arrival when it is cancelled."""

    more: dict[str, Any] = field(default_factory=dict)
    """Further sampling parameters."""


@dataclass(frozen=True)
class Wave:
    """Requests that share the engine, until all have ended."""

    requests: tuple[RequestCase, ...]
    resets: tuple[tuple[int, bool], ...] = ()
    """Steps at which the prefix cache is reset, and whether running requests start anew."""

    sleeps: int = 0
    """The level at which the engine sleeps before the first request; 0: it does not."""


@dataclass(frozen=True)
class Case:
    """An engine and all that it is sent."""

    engine: EngineCase
    waves: tuple[Wave, ...]

    def write(self, path: Path) -> None:
        """As a file of JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Case":
        """What `write` wrote."""
        case = json.loads(path.read_text())
        waves = tuple(
            Wave(
                tuple(RequestCase(**request) for request in wave["requests"]),
                tuple((step, restarts) for step, restarts in wave["resets"]),
                wave.get("sleeps", 0),
            )
            for wave in case["waves"]
        )
        return cls(EngineCase(**case["engine"]), waves)
