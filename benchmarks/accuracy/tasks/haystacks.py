"""Haystacks of a given number of tokens, whatever the tokenizer."""

from collections.abc import Callable

from benchmarks.accuracy.tokens import Tokens


def fill(make: Callable[[int], str], tokens: Tokens, room_tokens: int) -> str:
    """The longest text that fits.

    Args:
        make: a text from its size, in whatever unit; grows with it.
        tokens: counts.
        room_tokens: tokens that the text may have.

    Raises:
        ValueError: the smallest text (size 1) does not fit.
    """
    if tokens.count(make(1)) > room_tokens:
        raise ValueError(f"a context of {room_tokens} tokens is too short for this task")
    low, high = 1, 2
    while tokens.count(make(high)) <= room_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if tokens.count(make(middle)) <= room_tokens:
            low = middle
        else:
            high = middle
    return make(low)
