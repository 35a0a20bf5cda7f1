"""How many rows a vLLM block has: its tokens' keys|values, and what pages are scored by.

The rows that a score needs come in *units*: so many tokens with so many rows of their own behind
the block's keys and values. Scores of bounds have one row, minimum|maximum, per page. `codes` has
nine rows per group of 128 tokens: eight of codes and one of scales (`csrc/codes.h`). A block holds
whole units, and a unit does not know of the others.
"""

from vllm_quest.config import GROUP_TOKENS, Score

GROUP_ROWS = 9
"""Rows of a group's codes (8, of which fp32 caches fill 4) and of its scales (1)."""


def unit(page_size: int, score: Score) -> tuple[int, int]:
    """The smallest block: its tokens, and the rows of what they are scored by."""
    return (GROUP_TOKENS, GROUP_ROWS) if score == "codes" else (page_size, 1)


def block_rows(block_tokens: int, page_size: int, score: Score) -> int:
    """All rows of a block of whole units."""
    tokens, rows = unit(page_size, score)
    return block_tokens + block_tokens // tokens * rows


def block_tokens(block_rows: int, page_size: int, score: Score) -> int:
    """The tokens of a block of so many rows.

    Raises:
        ValueError: the rows are no whole number of units.
    """
    tokens, rows = unit(page_size, score)
    units, remainder = divmod(block_rows, tokens + rows)
    if remainder:
        raise ValueError(
            f"a KV cache block has {block_rows} rows; expected a multiple of {tokens + rows}, "
            f"{tokens} tokens and what they are scored by"
        )
    return units * tokens


def mass_columns(max_pages: int, page_size: int) -> int:
    """Columns of the scratch that `ops.score_codes` and `ops.weigh_pages` fill.

    Pages, and behind them groups of 128 tokens, both rounded up to 16 bytes of fp32 (`check_masses`
    in `csrc/checks.h`).
    """
    max_groups = max_pages * page_size // GROUP_TOKENS
    return -(-max_pages // 4) * 4 + -(-max_groups // 4) * 4
