"""What one layer keeps of a text while it decodes, and attention to it, in plain PyTorch.

Every row of a cache begins with a text that was read densely; then it feeds tokens of its own. All
that a step attends to, the token being fed included, is at most the token budget. With grouped
queries a KV head's attention is that of its group's heads together.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_quest import reference
from vllm_quest.config import QuestConfig
from vllm_quest.ops import Rows

MAX_CHUNK_ELEMENTS = 2**24
"""Of the attention weights that are held at once while they are summed up."""


@dataclass(frozen=True, eq=False)
class ReadText:
    """What dense reading left in a layer. Keys are those after the rotary embedding."""

    key: Tensor  # [num_kv_heads, num_tokens, head_size]
    value: Tensor  # the same
    last_weights: Tensor  # [num_tokens] fp32, the last token's attention, mean over the heads
    received: Tensor | None
    """`[num_kv_heads, num_tokens]` fp32, attention each token got from all; None: not asked for."""

    @property
    def num_tokens(self) -> int:
        return self.key.shape[1]


Texts = Sequence[ReadText]
"""One text per row. Neighbours may have the same one: it is kept once then."""


def runs(texts: Texts) -> list[tuple[ReadText, int]]:
    """Each text, and how many neighbouring rows begin with it."""
    return [(text, len(list(rows))) for text, rows in itertools.groupby(texts)]


def read_densely(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, sum_received: bool
) -> tuple[ReadText, Tensor]:
    """Causal attention of a text to itself.

    Args:
        query: `[num_heads, num_tokens, head_size]`.
        key: `[num_kv_heads, num_tokens, head_size]`.
        value: the same.
        scale: factor of q·k.
        sum_received: whether to find out how much attention each token gets, which is slow.

    Returns:
        what a cache begins with, and the output, of the query's shape.
    """
    out = F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]
    grouped = query.unflatten(0, (len(key), -1))
    last = attention_weights(grouped[:, :, -1:], key, scale)
    received = received_attention(grouped, key, scale) if sum_received else None
    return ReadText(key, value, last.mean(dim=(0, 1, 2)), received), out


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal attention summed over queries `[num_kv_heads, group_size, num_tokens, head_size]`."""
    num_tokens = key.shape[1]
    received = torch.zeros(key.shape[:2], dtype=torch.float32, device=key.device)
    chunk = max(1, MAX_CHUNK_ELEMENTS // (query.shape[0] * query.shape[1] * num_tokens))
    for first in range(0, num_tokens, chunk):
        end = min(first + chunk, num_tokens)
        # This is all about memory traffic: scale in the product, mask the square where it matters.
        rows = query[:, :, first:end].flatten(1, 2)  # [kv_heads, group_size * chunk, d]
        logits = torch.baddbmm(rows.new_empty(()), rows, key[:, :end].mT, beta=0, alpha=scale)
        later = torch.ones(end - first, end - first, dtype=torch.bool, device=key.device).triu(1)
        logits.unflatten(1, (-1, end - first))[..., first:].masked_fill_(later, -math.inf)
        received[:, :end] += logits.softmax(-1, dtype=torch.float32).sum(dim=1)
    return received


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax of q·k, in fp32.

    Args:
        query: `[..., group_size, num_queries, head_size]`.
        key: `[..., num_keys, head_size]`.
        scale: factor of q·k.

    Returns:
        `[..., group_size, num_queries, num_keys]`.
    """
    logits = (query @ key.unsqueeze(-3).mT).float() * scale
    return logits.softmax(dim=-1)


class FullCache:
    """Keeps everything: each text once, each row's own tokens apart."""

    def __init__(self, texts: Texts) -> None:
        self._runs = runs(texts)
        num_kv_heads, _, head_size = texts[0].key.shape
        self._key = texts[0].key.new_empty(len(texts), num_kv_heads, 0, head_size)
        self._value = self._key.clone()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one more token per row.

        Args:
            query: `[num_rows, num_heads, head_size]`.
            key: `[num_rows, num_kv_heads, head_size]`, the token's own, kept from now on.
            value: the same.
            scale: factor of q·k.

        Returns:
            the query's shape.
        """
        self._key = torch.cat((self._key, key[:, :, None]), dim=2)
        self._value = torch.cat((self._value, value[:, :, None]), dim=2)
        grouped = query.unflatten(1, (key.shape[1], -1))  # [rows, kv_heads, group, d]
        sizes = [num_rows for _, num_rows in self._runs]
        parts = [x.split(sizes) for x in (grouped, self._key, self._value)]
        outs = [
            _attend_to_text_and_own(text, *own, scale)
            for (text, _), *own in zip(self._runs, *parts, strict=True)
        ]
        return torch.cat(outs).flatten(1, 2)


def _attend_to_text_and_own(
    text: ReadText, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Of `[rows, kv_heads, group, d]` that share a text; own tokens `[rows, kv_heads, n, d]`."""
    of_text = torch.einsum("rhgd,htd->rhgt", query, text.key)
    logits = torch.cat((of_text, query @ key.mT), dim=-1)
    weights = (logits.float() * scale).softmax(-1).to(query.dtype)
    on_text, on_own = weights.split([text.num_tokens, key.shape[2]], dim=-1)
    return torch.einsum("rhgt,htd->rhgd", on_text, text.value) + on_own @ value


class EvictingCache:
    """Keeps some tokens, by position; what is dropped never comes back.

    All rows keep equally many: their texts have equally many tokens, or at least the budget.
    """

    def __init__(self, texts: Texts, token_budget: int) -> None:
        self._token_budget = token_budget
        begun = []
        for text, num_rows in runs(texts):
            # A text is cut down before it is given to its rows.
            self._key, self._value = text.key[None], text.value[None]  # [rows, kv_heads, kept, d]
            self._standing = self.first_standing(text)  # [rows, kv_heads or 1, kept] fp32
            self._make_room()
            begun.append(
                [x.expand(num_rows, *x.shape[1:]) for x in (self._key, self._value, self._standing)]
            )
        self._key, self._value, self._standing = map(torch.cat, zip(*begun, strict=True))

    @property
    def num_kept(self) -> int:
        return self._key.shape[2]

    def first_standing(self, text: ReadText) -> Tensor:
        """What decides who stays, `[1, kv_heads or 1, num_tokens]`; higher is better."""
        raise NotImplementedError

    def kept(self, num_kept: int) -> Tensor:
        """The tokens to keep of those kept now, `[rows, kv_heads or 1, num_kept]`, in any order."""
        raise NotImplementedError

    def new_standing(self, weights: Tensor) -> Tensor:
        """Standing after a step with attention `[rows, kv_heads, group_size, kept]`."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `FullCache.attend`."""
        self._make_room()
        self._key = torch.cat((self._key, key[:, :, None]), dim=2)
        self._value = torch.cat((self._value, value[:, :, None]), dim=2)
        self._standing = F.pad(self._standing, (0, 1))
        grouped = query.unflatten(1, (key.shape[1], -1)).unsqueeze(3)  # [rows, kv_heads, g, 1, d]
        weights = attention_weights(grouped, self._key, scale).squeeze(3)
        self._standing = self.new_standing(weights)
        return (weights.to(query.dtype) @ self._value).flatten(1, 2)

    def _make_room(self) -> None:
        """Drop what one more token takes the place of."""
        if self.num_kept < self._token_budget:
            return
        kept = self.kept(self._token_budget - 1).sort(dim=-1).values
        self._standing = self._standing.gather(2, kept)
        places = kept.expand(-1, self._key.shape[1], -1)[..., None]
        places = places.expand(-1, -1, -1, self._key.shape[3])
        self._key, self._value = self._key.gather(2, places), self._value.gather(2, places)


class H2OCache(EvictingCache):
    """H2O (arXiv 2306.14048): half of the budget for the newest tokens, half for heavy hitters.

    Heavy hitters are those that got the most attention, summed over all queries since the text's
    first, while they were kept. Every KV head keeps tokens of its own.
    """

    def first_standing(self, text: ReadText) -> Tensor:
        assert text.received is not None
        return text.received[None]

    def kept(self, num_kept: int) -> Tensor:
        num_heavy = self._token_budget // 2
        num_recent = num_kept - num_heavy  # the token about to be fed makes it half of the budget
        first_recent = self.num_kept - num_recent
        heavy = self._standing[..., :first_recent].topk(num_heavy, dim=-1).indices
        recent = torch.arange(first_recent, self.num_kept, device=heavy.device)
        return torch.cat((heavy, recent.expand(*heavy.shape[:2], -1)), dim=-1)

    def new_standing(self, weights: Tensor) -> Tensor:
        return self._standing + weights.sum(dim=2)


class TovaCache(EvictingCache):
    """TOVA (arXiv 2401.06104): whom the newest token attended to the least is dropped.

    Attention is averaged over all heads: a layer keeps the same tokens for all.
    """

    def first_standing(self, text: ReadText) -> Tensor:
        return text.last_weights[None, None]

    def kept(self, num_kept: int) -> Tensor:
        return self._standing.topk(num_kept, dim=-1).indices

    def new_standing(self, weights: Tensor) -> Tensor:
        return weights.mean(dim=(1, 2)).unsqueeze(1)


class QuestCache:
    """QUEST by the functions of `vllm_quest.reference`, in pages as vLLM has them.

    All rows have one text and share its whole pages; each has a copy of the last, unfinished one.
    """

    def __init__(
        self, text: ReadText, num_rows: int, token_budget: int, num_steps: int, quest: QuestConfig
    ) -> None:
        num_kv_heads, num_tokens, head_size = text.key.shape
        page_size = quest.page_size
        shared = num_tokens // page_size
        own = reference.num_pages(num_tokens - shared * page_size + num_steps, page_size)
        pages = shared + num_rows * own
        self._quest = quest
        self._cache = text.key.new_zeros(pages, num_kv_heads, page_size + 1, 2 * head_size)
        own_pages = torch.arange(shared, pages).view(num_rows, own)
        shared_pages = torch.arange(shared).expand(num_rows, -1)
        self._tables = torch.cat((shared_pages, own_pages), dim=1).int()
        self._lengths = torch.zeros(num_rows, dtype=torch.int32)
        num_pages = reference.num_pages(token_budget, page_size)
        self._budget_pages = torch.full((num_rows,), num_pages, dtype=torch.int32)
        self._scores = torch.empty(num_rows, num_kv_heads, shared + own)
        self._pages = torch.empty(num_rows, num_kv_heads, num_pages, dtype=torch.int32)

        key, value = text.key.transpose(0, 1), text.value.transpose(0, 1)
        for row in range(num_rows):
            first = 0 if row == 0 else shared * page_size
            self._write(row, key[first:], value[first:], first)
        self._lengths.fill_(num_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `FullCache.attend`."""
        for row, length in enumerate(self._lengths.tolist()):
            self._write(row, key[row : row + 1], value[row : row + 1], length)
        self._lengths += 1
        rows = Rows(self._tables, self._lengths, self._budget_pages)
        page_size = self._quest.page_size
        reference.score(query, self._cache, rows, self._scores, page_size=page_size)
        reference.select(
            self._scores,
            rows,
            self._pages,
            page_size=page_size,
            keep_first_pages=self._quest.keep_first_pages,
            keep_newest_percent=self._quest.keep_newest_percent,
        )
        out = torch.empty_like(query)
        reference.sparse_decode(
            query, self._cache, rows, self._pages, out, page_size=page_size, scale=scale
        )
        return out

    def _write(self, row: int, key: Tensor, value: Tensor, position: int) -> None:
        positions = torch.arange(position, position + len(key))
        page_size = self._quest.page_size
        pages = self._tables[row, positions // page_size].long()
        slots = pages * page_size + positions % page_size
        reference.write_kv(
            key, value, self._cache, slots, page_size=page_size, score=self._quest.score
        )


Cache = FullCache | EvictingCache | QuestCache
