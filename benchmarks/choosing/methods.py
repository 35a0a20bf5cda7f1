"""The methods that are compared: a score, a size of page, and what is kept before all others."""

from dataclasses import dataclass, replace

from benchmarks.choosing import scores
from benchmarks.choosing.scores import Levels, Rank, Score, keys_in_bits
from benchmarks.choosing.selection import Keep

BLOCK_BYTES_RATIO = 1 / 8
"""Two bf16 vectors per block of 128 tokens, relative to min/max of pages of 16."""

NOTHING = Keep()
SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class Method:
    """A way to choose pages."""

    name: str
    score: Score
    page_tokens: int
    keep: Keep
    bytes_ratio: float | None
    """Bytes that scoring reads, relative to bf16 min/max of pages of 16; None: an oracle."""

    held: float | None = None
    """The share of attention at which a step takes no more pages (top-p); None: at the budget."""


def _kept(share: float) -> Keep:
    return Keep(first_page=True, newest_share=share)


def _of_blocks(keep: Keep) -> Keep:
    return Keep(keep.first_page, keep.newest_share, unfinished_block=True)


def _keys(
    bits: int, rank: Rank, keep: Keep, label: str, *, page: int = 16, levels: Levels = "gaussian"
) -> Method:
    spacing = ", even levels" if levels == "even" else ""
    name = f"keys {bits} bit{'s' if bits > 1 else ''}{spacing}, {rank}, p{page}{label}"
    ratio = bits / 2 + BLOCK_BYTES_RATIO
    return Method(name, keys_in_bits(bits, rank, levels), page, _of_blocks(keep), ratio)


def _minmax(page: int, keep: Keep, label: str) -> Method:
    return Method(f"min/max, p{page}{label}", scores.minmax, page, keep, 16 / page)


def _minmax_4_bits(page: int) -> Method:
    ratio = 4 / page + BLOCK_BYTES_RATIO
    keep = _of_blocks(_kept(1 / 4))
    return Method(f"min/max 4 bits, p{page} +25", scores.minmax_4_bits, page, keep, ratio)


def _label(share: float) -> str:
    return f" +{share:.0%}".removesuffix("%")


def _held(method: Method, share: float) -> Method:
    return replace(method, name=f"{method.name}, {share:.0%} held", held=share)


QUARTER = _kept(1 / 4)
TWO_BITS = _keys(2, "mass", _kept(0), _label(0))
MASS_ORACLE = Method("oracle mass, p16", scores.true_mass, 16, NOTHING, None)
HELD_SHARES = (0.8, 0.9, 0.95, 0.98)
METHODS: tuple[Method, ...] = (
    _minmax(16, NOTHING, ""),
    *(_minmax(16, _kept(share), _label(share)) for share in SHARES),
    _minmax(8, QUARTER, " +25"),
    _minmax_4_bits(8),
    _minmax_4_bits(4),
    _keys(2, "mass", NOTHING, ""),
    *(_keys(2, "mass", _kept(share), _label(share)) for share in SHARES),
    _keys(2, "mass", QUARTER, " +25", page=8),
    _keys(2, "mass", QUARTER, " +25", levels="even"),
    _keys(2, "mass of coded keys", QUARTER, " +25"),
    _keys(2, "mass without totals", QUARTER, " +25"),
    _keys(2, "maximum", QUARTER, " +25"),
    _keys(1, "mass", QUARTER, " +25"),
    _keys(1, "mass without totals", QUARTER, " +25"),
    _keys(4, "mass", QUARTER, " +25"),
    Method("oracle maximum, p16", scores.true_maximum, 16, NOTHING, None),
    Method("oracle maximum, p16 +25", scores.true_maximum, 16, QUARTER, None),
    MASS_ORACLE,
    Method("oracle mass, p16 +25", scores.true_mass, 16, QUARTER, None),
    Method("oracle mass, p8 +25", scores.true_mass, 8, QUARTER, None),
    Method("StreamingLLM, p16", scores.newest, 16, _kept(0), 0.0),
    *(_held(method, share) for method in (TWO_BITS, MASS_ORACLE) for share in HELD_SHARES),
)
BASELINE = METHODS[0]
"""QUEST's paper's, which the others are compared with."""
