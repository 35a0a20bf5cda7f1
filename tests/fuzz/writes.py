"""What `write_kv` should have stored: the keys and values given, and what pages are scored by."""

from dataclasses import dataclass

import torch
from torch import Tensor

import batched_reference
from batch import bounds_error
from batched_reference import Blocks, bits, exact, gathered
from vllm_quest import ops, reference
from vllm_quest.config import GROUP_TOKENS, Score


@dataclass
class Write:
    """A call of `write_kv`: what it writes to."""

    kv_cache: Tensor  # see `ops`
    slots: Tensor  # [num_slots] int64; -1 is padding
    page_size: int
    score: Score
    scales: ops.KvScales | None

    def __post_init__(self) -> None:
        self.block_tokens = reference.tokens_per_block(self.kv_cache, self.page_size, self.score)
        self.is_real = self.slots >= 0
        written = self.slots[self.is_real]
        self.numbers, self.place = torch.unique(written // self.block_tokens, return_inverse=True)
        self.token = written % self.block_tokens

    def blocks(self) -> Tensor:
        """The blocks that it writes to, as they are now."""
        return gathered(self.kv_cache, self.numbers)

    def filled(self) -> Tensor:
        """`[num_blocks]` int64: tokens up to the last one that is written."""
        filled = torch.zeros_like(self.numbers)
        return filled.scatter_reduce_(0, self.place, self.token + 1, "amax")

    def keys_values(self, key: Tensor, value: Tensor) -> Tensor:
        """The bits that are to be stored, `[num_written, num_kv_heads, 2 * head_size]`."""
        parts = [side[: len(self.slots)][self.is_real] for side in (key, value)]
        if self.scales is not None:
            scales = (self.scales.key, self.scales.value)
            parts = [reference.quantised(*each) for each in zip(parts, scales, strict=True)]
        return torch.cat([bits(part) for part in parts], dim=-1)

    def faults(self, before: Tensor, key: Tensor, value: Tensor) -> list[str]:
        """What is wrong with the blocks as they are now, which were `before`: every bit of them."""
        found, expected = self.blocks(), before
        bits(expected)[self.place, :, self.token] = self.keys_values(key, value)
        if self.score == "codes":
            faults = self._update_codes(expected, found)
        else:
            faults = self._update_bounds(expected, found)
        differ = bits(found) != bits(expected)
        if self.score != "codes":  # a bound of 0 may have either sign
            bounds = slice(self.block_tokens, None)
            differ[:, :, bounds] &= exact(found[:, :, bounds]) != exact(expected[:, :, bounds])
        if differ.any():
            faults.append("write_kv stored other bytes than those of the reference")
        return faults

    def _update_codes(self, expected: Tensor, found: Tensor) -> list[str]:
        """Take those of the groups that were completed, which are compared with their keys."""
        blocks, filled = self._with_fill(expected)
        num_groups = self.block_tokens // GROUP_TOKENS
        ends = torch.zeros(len(self.numbers), num_groups, dtype=torch.bool, device=found.device)
        is_end = self.token % GROUP_TOKENS == GROUP_TOKENS - 1
        ends[self.place[is_end], self.token[is_end] // GROUP_TOKENS] = True
        codes = bits(expected)[:, :, self.block_tokens :].unflatten(2, (num_groups, -1))
        found_codes = bits(found)[:, :, self.block_tokens :].unflatten(2, (num_groups, -1))
        block, group = ends.nonzero(as_tuple=True)
        codes[block, :, group] = found_codes[block, :, group]
        differ = batched_reference.codes_differ(blocks, filled)
        if (differ & ends.flatten()).any():
            return ["codes are not those of the keys written"]
        return []

    def _update_bounds(self, expected: Tensor, found: Tensor) -> list[str]:
        """Compute those of the pages that were written to, as far as they are exact."""
        blocks, filled = self._with_fill(expected)
        stored = batched_reference.stored_bounds(blocks)
        is_touched = torch.zeros_like(stored[:, :1, :, :1], dtype=torch.bool)
        is_touched[self.place, 0, self.token // self.page_size] = True
        right = reference.to_dtype(batched_reference.bounds(blocks, filled), stored.dtype)
        bits(stored).copy_(bits(right).where(is_touched, bits(stored)))
        if self.score == "minmax":
            return []
        found_bounds = found[:, :, self.block_tokens :]
        error = bounds_error(expected[:, :, : self.block_tokens], self.page_size)
        is_far = (exact(found_bounds) - exact(stored)).abs() > error
        bits(stored).copy_(bits(found_bounds).where(is_touched, bits(stored)))
        if is_far[is_touched.expand_as(is_far)].any():
            return ["bounds are not those of the keys written"]
        return []

    def _with_fill(self, blocks: Tensor) -> tuple[Blocks, Tensor]:
        """Blocks, and the tokens up to the last one written to each."""
        table = torch.zeros(1, 1, dtype=torch.int64, device=blocks.device)
        whole = Blocks(blocks, self.numbers, table, table[0], self.page_size, self.score)
        return whole, self.filled()


def missing_keys(write: Write, key: Tensor, value: Tensor) -> bool:
    """Whether a cache has other keys or values in the slots than were given."""
    found = bits(write.blocks())[write.place, :, write.token]
    return not torch.equal(found, write.keys_values(key, value))
