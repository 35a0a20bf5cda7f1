"""QUEST's settings: one frozen, validated object, read from vLLM's `additional_config["quest"]`."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Bounds = Literal["minmax", "mean_std", "mid_dev"]
Score = Literal[Bounds, "codes"]
BOUNDS: tuple[Bounds, ...] = get_args(Bounds)
"""Scores that are made of two values per channel and page."""
SCORES: tuple[Score, ...] = (*BOUNDS, "codes")

LONGEST_SHOWN = 100
"""Characters of a user's value that an error shows."""

GROUP_TOKENS = 128
"""Tokens whose codes share a scale, with the score `codes`."""

Tokens = TypeVar("Tokens", int, np.ndarray)

SECTION = "quest"
UNLIMITED = -1
"""The token budget that means full attention."""


@dataclass(frozen=True)
class QuestConfig:
    """What a user may set, with `--additional-config '{"quest": {...}}'`.

    Raises:
        ValueError: a value is of the wrong type or out of range.
    """

    token_budget: int = 2048
    """Tokens attended per KV head in one decode step, rounded up to whole pages; -1: no limit."""

    dense_layers: int = 2
    """Layers at the front that always attend in full (arXiv 2406.10774, section 3.3: two)."""

    page_size: int = 16
    """Tokens per page; a multiple of 8 that divides vLLM's block size."""

    score: Score = "minmax"
    """What a page's score is made of. `minmax` is the paper's: the keys' minimum and maximum, a
    bound that no key of the page exceeds. `mean_std` (mean ∓ standard deviation) and `mid_dev`
    (middle of the extremes ∓ mean deviation from it) are estimates, which a key may exceed.
    `codes` keeps every key in 2 bits and ranks pages by the share of the attention that they are
    estimated to hold; page_size must divide 128, and vLLM's block size be a multiple of 128. It
    needs the first page kept. At pages of 16 tokens bounds take 1/17 of the memory, codes 9/137.
    Engines that hand each other stored KV must agree on it."""

    keep_first_pages: int = 1
    """Pages at the front that rows over their budget attend to whatever their scores, within the
    budget: many models put much of their attention on the first tokens (attention sinks). The
    newest page comes before them, so a budget of one page is the newest alone. The paper's method
    is 0."""

    keep_newest_percent: int = 0
    """The share of the budget, 0 to 100 percent, that goes to the newest pages whatever their
    scores. The newest page is always attended to."""

    _active: ClassVar["QuestConfig"]

    def __post_init__(self) -> None:
        for field in (field.name for field in fields(self) if field.name != "score"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise _bad_value(field, value, "an integer")
        if self.token_budget != UNLIMITED and self.token_budget < 1:
            raise _bad_value("token_budget", self.token_budget, "a positive integer, or -1")
        if self.dense_layers < 0:
            raise _bad_value("dense_layers", self.dense_layers, "0 or a positive integer")
        if self.page_size < 8 or self.page_size % 8 != 0:
            raise _bad_value("page_size", self.page_size, "a positive multiple of 8")
        if self.keep_first_pages < 0:
            raise _bad_value("keep_first_pages", self.keep_first_pages, "0 or a positive integer")
        if not 0 <= self.keep_newest_percent <= 100:
            raise _bad_value("keep_newest_percent", self.keep_newest_percent, "0 to 100")
        if self.score not in SCORES:
            raise _bad_value("score", self.score, ", ".join(SCORES))
        if self.score == "codes" and GROUP_TOKENS % self.page_size != 0:
            allowed = f'a divisor of {GROUP_TOKENS} with "score": "codes": 8, 16, 32, 64 or 128'
            raise _bad_value("page_size", self.page_size, allowed)

    @classmethod
    def from_settings(cls, settings: Any) -> "QuestConfig":
        """Validate a user's `quest` section.

        Raises:
            ValueError: not a mapping, an unknown key, or a bad value.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"additional_config['{SECTION}'] is {shown(settings)}; expected a mapping such as "
                '{"token_budget": 2048}'
            )
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:LONGEST_SHOWN], known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"additional_config['{SECTION}'] has an unknown key {shown(key)}.{hint} "
                    f"Known keys: {', '.join(known)}"
                )
        return cls(**settings)

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "QuestConfig":
        """Read the settings that a vLLM configuration carries.

        Raises:
            ValueError: see `from_settings`; or settings stand beside the section.
        """
        additional = vllm_config.additional_config
        if not isinstance(additional, Mapping):
            return cls()
        for key in additional:
            _refuse_misplaced(key, [field.name for field in fields(cls)])
        return cls.from_settings(additional.get(SECTION, {}))

    def activate(self) -> "QuestConfig":
        """Make these settings those of the model that this process is building or running."""
        QuestConfig._active = self
        return self

    @classmethod
    def active(cls) -> "QuestConfig":
        """The settings of the model that this process is building or running.

        vLLM asks the backend class for block sizes and cache specs without handing it a
        configuration, at times outside `set_current_vllm_config` too. Inside, the current
        configuration answers and is activated; outside, the settings activated last answer.
        """
        from vllm.config import get_current_vllm_config_or_none

        vllm_config = get_current_vllm_config_or_none()
        return cls._active if vllm_config is None else cls.from_vllm(vllm_config).activate()

    @property
    def kept(self) -> dict[str, Any]:
        """What is kept before pages are chosen by their scores, as `ops.select` takes it.

        No context has more first pages, and settings of any size fit the operators' int64.
        """
        return {
            "keep_first_pages": min(self.keep_first_pages, np.iinfo(np.int32).max),
            "keep_newest_percent": self.keep_newest_percent,
        }

    def pages(self, num_tokens: Tokens) -> Tokens:
        """The pages that hold a number of tokens, rounded up; one number or an array of them."""
        return -(-num_tokens // self.page_size)


QuestConfig().activate()


def engine_key(vllm_config: "VllmConfig") -> int:
    """What tells an engine from the others of its process.

    Copies that vLLM makes of a configuration share their compilation_config, whereas
    `vllm_config.instance_id` changes while an engine starts (`vllm/v1/engine/core.py`,
    startup_handshake, calls `__post_init__` again).
    """
    return id(vllm_config.compilation_config)


def _refuse_misplaced(key: Any, settings: list[str]) -> None:
    """Refuse a key beside the section that its user surely meant for QUEST.

    Raises:
        ValueError: a setting's name, or a name like the section's with other capitals or letters.
    """
    if key == SECTION:
        return
    words = re.split(r"[^a-z]+", str(key).lower())
    is_like_section = any(
        word[:1] == SECTION[0] and difflib.get_close_matches(word, [SECTION], cutoff=0.75)
        for word in words
    )
    if is_like_section or key in settings:
        raise ValueError(
            f"additional_config has a key {shown(key)}, which nothing reads; QUEST's settings go "
            f'into its section "{SECTION}": {{"{SECTION}": {{"token_budget": 2048}}}}'
        )


def shown(value: object) -> str:
    """A user's value as an error shows it: in one line, and cut if it is long."""
    text = repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"


def _bad_value(key: str, value: object, allowed: str) -> ValueError:
    return ValueError(
        f"additional_config['{SECTION}']['{key}'] is {shown(value)}; allowed: {allowed}"
    )
