"""Every decode row of a worker, and some other tokens, compared with the reference while it serves.

A *row* is one query token in one layer's decode. Its length, budget, blocks and slots must be those
that the scheduler told of the request (`ledger`), the bounds of its pages those of the keys beside
them, its pages the best by their scores, its output within the derived tolerance, and the counters
exact. Of some tokens that the dense backend attends for (`dense`) the output is compared, but with
fp8 caches, of which FLASH_ATTN rounds queries and weights to fp8. Faults are kept, not raised, so
that an engine can go on and say all of them.

CUDA graphs run operators out of sight, but keep what layers were given and gave (`graphs`): of
such steps all is checked once they have ended.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import batched_reference
from batch import (
    bounds_error,
    rounding_of_the_query,
    score_codes_error,
    score_error,
)
from batched_reference import Blocks
from vllm_quest import layout, ops, reference
from vllm_quest.config import QuestConfig
from vllm_quest.impl import QuestImpl
from vllm_quest.layers import is_full_attention
from vllm_quest.metadata import QuestMetadata, QuestMetadataBuilder
from vllm_quest.monitor import Monitor

from .dense import DenseToken, as_rows, chosen_tokens, first_seen_by
from .graphs import TAPS
from .ledger import Ledger, budget_pages
from .writes import Write, missing_keys

MAX_FAULTS = 20
ROOM_NUMBERS = 1 << 26
"""Keys and values that are compared at a time: some copies of them in fp64 take GiBs."""
ROWS_AT_ONCE = {"cpu": 16, "cuda": 128}
NEAR_TIE = 1e-4
"""Leads of scores, relative to the largest of their row, that are kept."""

REAL = {
    name: getattr(ops, name)
    for name in ("write_kv", "score", "score_codes", "select", "sparse_decode", "cluster_decode")
}


class Row(NamedTuple):
    """A decode row as its request has it."""

    request_id: str
    seq_len: int
    budget: int | None
    """Pages; None for no limit."""

    is_unsettled: bool
    blocks: list[int]


class Attended(NamedTuple):
    """What `batch` derives errors from."""

    query: Tensor
    kv_cache: Tensor
    rows: ops.Rows
    scale: float
    soft_cap: float
    sinks: Tensor | None
    scales: ops.KvScales | None
    block_tokens: int


class Step(NamedTuple):
    """A layer's part in a step, as the plan and the requests have it."""

    rows: list[Row]
    filled: dict[int, int]
    """Tokens that each block of the step's requests holds, this step's own included."""

    num_tokens: int
    metadata: QuestMetadata
    dense_tokens: list[DenseToken]


@dataclass
class Totals:
    """What was checked."""

    rows: int = 0
    """Decode rows of the model's layers, each with its request."""

    sparse_rows: int = 0
    """Those over their budget."""

    draft_rows: int = 0
    """Rows of a draft head's layers, which no request is known for."""

    rows_in_graphs: int = 0
    """Of all rows, those whose operators a CUDA graph ran."""

    dense_tokens: int = 0
    """Tokens whose output by the dense backend was compared."""

    pages: int = 0
    """Pages of sparse rows, chosen among by each KV head."""

    steps: int = 0
    writes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{name: count + getattr(other, name) for name, count in vars(self).items()})


@dataclass
class Checker:
    """Checks one worker. `layers` counts full-attention layers within a step."""

    runner: Any
    quest: QuestConfig
    ledger: Ledger = field(default_factory=Ledger)
    totals: Totals = field(default_factory=Totals)
    faults: list[str] = field(default_factory=list)
    leads: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By request: where its choice of pages was a near tie, as (seq_len, relative lead)."""

    order: list[str] | None = None
    """Requests of the step in the batch's order, of the V2 runner; V1's runner has it."""

    in_step: bool = False
    layers: int = 0
    layer: str = ""
    cursor: int = 0
    seen: set[str] = field(default_factory=set)  # layers of this step
    planned: dict[str, Step] = field(default_factory=dict)  # by layer
    scored: Tensor | None = None

    @functools.cached_property
    def own_layers(self) -> set[str]:
        """The model's layers, without those of a draft head."""
        modules = self.runner.get_model().modules()
        return {module.layer_name for module in modules if is_full_attention(module)}

    def fault(self, what: str) -> None:
        """Keep a fault; the first ones say it all."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"step {self.totals.steps}, {self.layer or 'no layer'}: {what}")

    # ---- steps and batches

    def step(self, execute: Callable[..., Any], scheduled: Any, *rest: Any, **named: Any) -> Any:
        """`execute_model` of the runner."""
        self.ledger.update(scheduled)
        self.totals.steps += 1
        self.in_step, self.layers, self.order = True, 0, None
        self.planned.clear()
        self.seen.clear()
        before = self.counts()
        try:
            result = execute(scheduled, *rest, **named)
            if self.planned.keys() - self.seen:
                with torch.inference_mode():
                    self.check_graph(self.counts() - before)
            return result
        finally:
            self.in_step, self.layer = False, ""

    def counts(self) -> Tensor:
        """The engine's counters, `[5]` int64 on the host; zeros where there are no graphs."""
        monitor = Monitor.existing(self.runner.vllm_config) if TAPS else None
        return torch.tensor([0] * 5 if monitor is None else monitor.counts().values())

    def check_graph(self, counted: Tensor) -> None:
        """All layers of a step that a CUDA graph ran, from what it kept of them."""
        if self.seen:
            self.fault(f"a graph ran some layers, and not {self.seen}")
        expected = torch.zeros_like(counted)
        for number, name in enumerate(name for name in TAPS if name in self.planned):
            self.layers, self.layer, self.cursor = number, name, 0
            step, tap = self.planned[name], TAPS[name]
            plan, num_rows = step.metadata.decode, len(step.rows)
            if tap.impl.has_own_cache:
                slots = step.metadata.slot_mapping[: step.num_tokens]
                key, value = tap.key[: step.num_tokens], tap.value[: step.num_tokens]
                if missing_keys(self.written(tap.typed_cache, slots, tap.scales), key, value):
                    self.fault("a graph stored other keys or values than it was given")
            self.seen.add(name)
            if plan is None or not num_rows:
                continue
            is_dense = name in step.metadata.dense_layers
            rows, query = plan.dense_rows if is_dense else plan.rows, tap.query[:num_rows]
            options = {
                "page_size": self.quest.page_size,
                "score": self.quest.score,
                "scale": tap.impl.scale,
                "soft_cap": tap.impl.soft_cap,
                "sinks": tap.impl.sinks,
                "scales": tap.scales,
            }
            pages = self.choose(query, tap.typed_cache, rows[:num_rows], **options)
            out = tap.out[:num_rows]
            expected += self.check(query, tap.typed_cache, rows[:num_rows], pages, out, **options)
            self.scored = None
            self.totals.rows_in_graphs += num_rows
        if left := self.planned.keys() - self.seen:
            self.fault(f"graphs kept nothing of {sorted(left)}")
        if counted.tolist() != expected.tolist():
            self.fault(f"a graph's counters grew by {counted.tolist()}, not {expected.tolist()}")

    def batch_order(self) -> list[str]:
        """The requests of the step, as the queries lie in the batch."""
        return list(self.runner.input_batch.req_ids if self.order is None else self.order)

    def group_of(self, builder: QuestMetadataBuilder) -> int:
        """The KV cache group of a builder's layers."""
        groups = self.runner.kv_cache_config.kv_cache_groups
        [group] = [
            number
            for number, group in enumerate(groups)
            if set(builder.layer_names) <= set(group.layer_names)
        ]
        return group

    def plan(self, builder: QuestMetadataBuilder, metadata: QuestMetadata) -> None:
        """Compare a batch's metadata with the ledger, and note the rows that operators will get."""
        group = self.group_of(builder)
        spec = self.runner.kv_cache_config.kv_cache_groups[group].kv_cache_spec
        ratio, rest = divmod(spec.block_size, builder.kv_cache_spec.block_size)
        block_tokens = spec.block_size
        requests = [(name, self.ledger.requests[name]) for name in self.batch_order()]
        if sorted(name for name, _ in requests) != sorted(
            name for name, request in self.ledger.requests.items() if request.num_scheduled
        ):
            self.fault("the batch has other requests than the scheduler sent")
            return
        if ratio != 1 or rest:
            self.fault(f"vLLM split blocks of {block_tokens} tokens")
        rows, tokens = [], 0
        slots: list[int] = []
        dense_tokens: list[DenseToken] = []
        for name, request in requests:
            in_rows = tokens < metadata.num_decode_rows
            tokens += request.num_scheduled
            blocks = request.blocks[group]
            positions = range(request.num_computed, request.num_stored)
            slots += [
                blocks[at // block_tokens] * block_tokens + at % block_tokens for at in positions
            ]
            if in_rows and request.is_reading_prompt and request.num_scheduled > 1:
                self.fault(f"{name} reads its prompt in decode rows: {request}")
            if not in_rows and request.is_decoding:
                self.fault(f"{name} decodes outside of the decode rows: {request}")
            if in_rows:
                budget = budget_pages(request, self.quest.token_budget, self.quest.page_size)
                unsettled = request.is_reading_prompt
                rows += [Row(name, at + 1, budget, unsettled, blocks) for at in positions]
            else:
                first = tokens - request.num_scheduled
                dense_tokens += chosen_tokens(name, request, first, blocks)
        if len(rows) != metadata.num_decode_rows:
            self.fault(f"{metadata.num_decode_rows} decode rows; requests have {len(rows)}")
        found = metadata.slot_mapping[: len(slots)].tolist()
        if found != slots:
            self.fault(f"slots {found}; requests have {slots}")
        if metadata.decode is not None:
            plan = metadata.decode.rows
            self.compare_rows(plan, rows)
            if metadata.decode.beside_write:
                self.check_settled(group, rows, plan.budget_pages.tolist(), block_tokens)
        filled = self.ledger.filled(group, block_tokens)
        for layer in self.own_layers.intersection(builder.layer_names):
            self.planned[layer] = Step(rows, filled, len(slots), metadata, dense_tokens)

    def compare_rows(self, found: ops.Rows, rows: list[Row], *, is_dense: bool = False) -> None:
        """Lengths, budgets and blocks."""
        max_pages = -(-self.runner.max_model_len // self.quest.page_size)
        found_lens, found_budgets = found.seq_lens.tolist(), found.budget_pages.tolist()
        block_tokens = self.block_tokens()
        table = found.block_table.cpu()
        if len(found_lens) != len(rows):
            self.fault(f"{len(found_lens)} rows; requests have {len(rows)}")
            return
        for index, row in enumerate(rows):
            if found_lens[index] != row.seq_len:
                self.fault(f"{row.request_id}: length {found_lens[index]}, not {row.seq_len}")
            budget = found_budgets[index]
            if row.is_unsettled and not is_dense:
                right = budget == ops.UNSETTLED_PAGES
            elif is_dense or row.budget is None or row.budget >= max_pages:
                right = budget >= max_pages and budget != ops.UNSETTLED_PAGES
            else:
                right = budget == row.budget
            if not right:
                self.fault(f"{row}: budget of {budget} pages")
            num_blocks = -(-row.seq_len // block_tokens)
            blocks = table[index, :num_blocks].tolist()
            if blocks != row.blocks[:num_blocks]:
                self.fault(f"{row.request_id}: blocks {blocks}, not {row.blocks[:num_blocks]}")

    def block_tokens(self) -> int:
        """Of QUEST's groups."""
        return int(self.runner.cache_config.block_size)

    def check_settled(
        self, group: int, rows: list[Row], budgets: list[int], block_tokens: int
    ) -> None:
        """csrc/cuda/DESIGN.md, "Decode begins beside the write": who writes what a row reads early.

        All pages of a row but its last GROWING_PAGES are of earlier steps, unless its budget is
        UNSETTLED_PAGES.
        """
        first_written: dict[int, list[tuple[str, int]]] = {}  # block -> who, from which token on
        for name, request in self.ledger.requests.items():
            if request.num_scheduled:
                for block in request.written_blocks(group, block_tokens):
                    index = request.blocks[group].index(block)
                    start = max(0, request.num_computed - index * block_tokens)
                    first_written.setdefault(block, []).append((name, start))
        for row, budget in zip(rows, budgets, strict=False):
            if budget == ops.UNSETTLED_PAGES:
                continue
            num_pages = -(-row.seq_len // self.quest.page_size)
            settled = max(0, num_pages - ops.GROWING_PAGES) * self.quest.page_size
            for index, block in enumerate(row.blocks[: -(-settled // block_tokens)]):
                for name, start in first_written.get(block, ()):
                    if start < settled - index * block_tokens:
                        self.fault(
                            f"{row.request_id} ({self.ledger.requests[row.request_id]}) counts as "
                            f"settled, but block {block} is written in this step by {name}"
                        )

    # ---- one layer

    def forward(self, real: Callable[..., Tensor], layer: Any, *args: Any, **named: Any) -> Tensor:
        """`QuestImpl.forward` of one layer."""
        if not self.in_step:
            return real(layer, *args, **named)
        if not is_full_attention(layer):
            out = real(layer, *args, **named)
            query, _, _, kv_cache, *_ = args
            if query.is_cuda:  # CPU_ATTN packs its keys for the machine's instructions
                self.check_windowed(layer, query, kv_cache, out)
            return out
        self.layer, self.cursor = layer.layer_name, 0
        self.seen.add(self.layer)
        out = real(layer, *args, **named)
        if layer.layer_name in self.planned:
            rows = self.planned[layer.layer_name].rows
            if self.cursor != len(rows):
                self.fault(f"{self.cursor} rows were decoded of {len(rows)}")
            query, _, _, kv_cache, *_ = args
            self.check_prefill(layer, query, kv_cache, out)
        self.layers += 1
        self.layer = ""
        return out

    def check_prefill(self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        """The output of some tokens of prefills, which attend to all before them."""
        impl, tokens = layer.impl, self.planned[self.layer].dense_tokens
        if not tokens or impl.has_fp8_cache:
            return
        rows = as_rows(tokens, query.device)
        blocks = Blocks.of(kv_cache, rows, self.quest.page_size, self.quest.score)
        self.compare_tokens(tokens, blocks, impl, query, output)

    def check_windowed(self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        """The output of some tokens of each request in a layer that sees part of its context."""
        impl, groups = layer.impl, self.runner.kv_cache_config.kv_cache_groups
        of_layer = [i for i, each in enumerate(groups) if layer.layer_name in each.layer_names]
        if impl.has_fp8_cache or not of_layer:  # or a draft head's, or another's cache
            return
        [group] = of_layer
        tokens, place = [], 0
        for name in self.batch_order():
            request = self.ledger.requests[name]
            tokens += chosen_tokens(name, request, place, request.blocks[group])
            place += request.num_scheduled
        self.layer = layer.layer_name
        block_tokens = groups[group].kv_cache_spec.block_size
        if kv_cache.shape[2] != block_tokens:
            self.fault(f"blocks of {kv_cache.shape[2]} tokens, not {block_tokens}")
        else:
            rows = as_rows(tokens, query.device)
            blocks = Blocks.of(kv_cache, rows, block_tokens, "minmax", has_bounds=False)
            first_seen = first_seen_by(layer, blocks.seq_lens)
            self.compare_tokens(tokens, blocks, impl, query, output, first_seen)
        self.layer = ""

    def compare_tokens(
        self,
        tokens: list[DenseToken],
        blocks: Blocks,
        impl: QuestImpl,
        query: Tensor,
        output: Tensor,
        first_seen: Tensor | None = None,
    ) -> None:
        """Compare what the dense backend gave for some tokens of the batch."""
        places = torch.tensor([token.place for token in tokens], device=query.device)
        shape = (ROWS_AT_ONCE["cpu"], blocks.cache.shape[1], blocks.max_pages)
        is_attended = torch.ones(shape, dtype=torch.bool, device=query.device)
        layer = {"scale": impl.scale, "soft_cap": impl.soft_cap, "sinks": impl.sinks}
        for at in torch.arange(len(tokens), device=query.device).split(len(is_attended)):
            given = (query[places[at]], blocks.part(at), is_attended[: len(at)])
            first = None if first_seen is None else first_seen[at]
            exact, limit = batched_reference.attention(
                *given, **layer, rounds_weights=True, first_seen=first
            )
            difference = (output[places[at]].double() - exact).abs()
            wrong = (~(difference <= limit)).flatten(1).any(1)
            if wrong.any():
                row = int(wrong.nonzero()[0])
                self.fault(
                    f"{tokens[int(at[row])]}: output of {self.layer} is off by "
                    f"{float(difference[row].amax()):.3g}; allowed: {float(limit[row].amin()):.3g}"
                )
        self.totals.dense_tokens += len(tokens)

    def take_rows(self, found: ops.Rows) -> list[Row] | None:
        """The requests' rows for a call of an operator; None in layers of a draft head."""
        if self.layer not in self.planned:
            return None
        rows = self.planned[self.layer].rows[self.cursor : self.cursor + len(found)]
        self.cursor += len(found)
        self.compare_rows(found, rows, is_dense=self.layers < self.quest.dense_layers)
        return rows

    # ---- operators

    def written(self, kv_cache: Tensor, slots: Tensor, scales: ops.KvScales | None) -> Write:
        """What a call of `write_kv` stores, and where."""
        return Write(kv_cache, slots, self.quest.page_size, self.quest.score, scales)

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        *,
        scales: ops.KvScales | None = None,
        **options: Any,
    ) -> None:
        write = self.written(kv_cache, slots[: len(key)], scales)
        before = write.blocks()
        REAL["write_kv"](key, value, kv_cache, slots, scales=scales, **options)
        self.totals.writes += 1
        for fault in write.faults(before, key, value):
            self.fault(fault)

    def score(
        self, query: Tensor, kv_cache: Tensor, rows: ops.Rows, scores: Tensor, *, page_size: int
    ) -> None:
        REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        self.scored = scores

    def score_codes(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        masses: Tensor,
        scores: Tensor,
        **options: Any,
    ) -> None:
        REAL["score_codes"](query, kv_cache, rows, masses, scores, **options)
        self.scored = scores

    def sparse_decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        *,
        counters: Tensor | None = None,
        workspace: Tensor | None = None,
        **options: Any,
    ) -> None:
        scratch = {"workspace": workspace, "counters": counters}
        grown = growth("sparse_decode", query, kv_cache, rows, pages, out, **scratch, **options)
        self.check_call(query, kv_cache, rows, pages, out, grown, **options)

    def cluster_decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        out: Tensor,
        *,
        counters: Tensor | None = None,
        **options: Any,
    ) -> None:
        grown = growth("cluster_decode", query, kv_cache, rows, out, counters=counters, **options)
        layer = {
            name: options[name]
            for name in ("page_size", "score", "scale", "soft_cap", "sinks", "scales")
        }
        pages = self.choose(query, kv_cache, rows, **layer)
        self.check_call(query, kv_cache, rows, pages, out, grown, **layer)

    def check_call(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        grown: list[int] | None,
        **layer: Any,
    ) -> None:
        """Compare one call of a decode operator, and what its counters have grown by."""
        expected = self.check(query, kv_cache, rows, pages, out, **layer).tolist()
        if grown not in (None, expected):
            self.fault(f"counters grew by {grown}, not {expected}")
        self.scored = None

    def choose(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        *,
        page_size: int,
        score: Any,
        scale: float,
        soft_cap: float,
        **_: Any,
    ) -> Tensor:
        """The pages that a launch which scores, selects and attends should have chosen: those of
        the operators that do one after another, whose scores are the same bits."""
        block_tokens = reference.tokens_per_block(kv_cache, page_size, score)
        max_pages = rows.block_table.shape[1] * block_tokens // page_size
        scores = torch.empty(len(rows), kv_cache.shape[1], max_pages, device=query.device)
        pages = torch.zeros_like(scores, dtype=torch.int32)
        if score == "codes":
            columns = layout.mass_columns(max_pages, page_size)
            masses = scores.new_empty(*query.shape[:2], columns)
            logits = {"page_size": page_size, "scale": scale, "soft_cap": soft_cap}
            REAL["score_codes"](query, kv_cache, rows, masses, scores, **logits)
        else:
            REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        kept = {
            "keep_first_pages": self.quest.keep_first_pages,
            "keep_newest_percent": self.quest.keep_newest_percent,
        }
        REAL["select"](scores, rows, pages, page_size=page_size, **kept)
        self.scored = scores
        return pages

    def check(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        **layer: Any,
    ) -> Tensor:
        """Compare one call of a decode operator; returns what it should count."""
        numbers_of_row = kv_cache[0].numel() * rows.block_table.shape[1]
        size = max(1, ROOM_NUMBERS // numbers_of_row)
        expected = torch.zeros(5, dtype=torch.int64)
        scores = self.scored
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            self.scored = None if scores is None else scores[part]
            given = (query[part], kv_cache, rows[part], pages[part], out[part])
            expected += self.check_part(*given, **layer)
        return expected

    def check_part(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        *,
        page_size: int,
        scale: float,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
        score: Any = "minmax",
        scales: ops.KvScales | None = None,
    ) -> Tensor:
        """Compare some rows of a call, all at once; returns what they should count."""
        of_requests = self.take_rows(rows)
        blocks = Blocks.of(kv_cache, rows, page_size, score, scales)
        self.check_stored(blocks)
        budget = rows.budget_pages.long()
        is_sparse = blocks.num_pages > budget
        num_sparse = int(is_sparse.sum())
        shape = (len(rows), kv_cache.shape[1], blocks.max_pages)
        is_attended = torch.ones(shape, dtype=torch.bool, device=blocks.device)
        layer = (scale, soft_cap, sinks, scales, blocks.block_tokens)
        attended = Attended(query, blocks.cache, rows, *layer)
        if num_sparse:
            chosen = self.check_choice(attended, blocks, pages, is_sparse, budget, of_requests)
            is_attended = chosen.where(is_sparse[:, None, None], is_attended)
        logits = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
        exact = torch.empty(query.shape, dtype=torch.float64, device=blocks.device)
        limit = torch.empty_like(exact)
        # Rows that attend to about as many pages are computed together.
        order = torch.argsort(torch.where(is_sparse, budget, blocks.num_pages))
        for at in order.split(ROWS_AT_ONCE[query.device.type]):
            given = (query[at], blocks.part(at), is_attended[at])
            exact[at], limit[at] = batched_reference.attention(*given, **logits)
        difference = (out.double() - exact).abs()
        if not (difference <= limit).all():
            at = int((difference - limit).flatten(1).amax(1).nan_to_num(torch.inf).argmax())
            self.fault(
                f"row {at} ({of_requests and of_requests[at]}): output is off by "
                f"{float(difference[at].amax()):.3g}; allowed: {float(limit[at].amin()):.3g}"
            )
        if of_requests is None:
            self.totals.draft_rows += len(rows)
        else:
            self.totals.rows += len(rows)
            self.totals.sparse_rows += num_sparse
            self.totals.pages += int(blocks.num_pages[is_sparse].sum())
        return counts(blocks, budget, is_sparse)

    def check_stored(self, blocks: Blocks) -> None:
        """Bounds, or codes, are those of the keys beside them.

        Not of a draft head, whose pages have holes: on vLLM's V1 runner all requests of a batch go
        undrafted where one is near `max_model_len`, and the tokens of that step are never stored.
        """
        if self.layer not in self.planned:
            return
        filled = self.planned[self.layer].filled
        missing = set(blocks.numbers.tolist()) - filled.keys()
        if missing:
            self.fault(f"rows read blocks {missing}, which no request of this step has")
            return
        tokens_filled = blocks.tokens_filled(filled)
        if blocks.score == "codes":
            differ = batched_reference.codes_differ(blocks, tokens_filled).view(
                len(blocks.numbers), -1
            )
            if differ.any():
                numbers = blocks.numbers[differ.any(1)].tolist()
                self.fault(f"blocks {numbers} have not the codes of their keys")
            return
        expected = batched_reference.bounds(blocks, tokens_filled)
        found = batched_reference.exact(batched_reference.stored_bounds(blocks))
        if blocks.score == "minmax":
            differs = found != expected
        else:
            error = bounds_error(blocks.cache[:, :, : blocks.block_tokens], blocks.page_size)
            differs = (found.double() - expected.double()).abs() > error
        differs &= ~expected.isnan()
        if differs.any():
            at = differs.flatten(1).any(1)
            pages = differs[at][0].any(0).any(-1).nonzero().flatten().tolist()
            self.fault(f"block {int(blocks.numbers[at][0])}: pages {pages} have stale bounds")

    def check_choice(
        self,
        attended: Attended,
        blocks: Blocks,
        pages: Tensor,
        is_sparse: Tensor,
        budget: Tensor,
        of_requests: list[Row] | None,
    ) -> Tensor:
        """Scores and selection of the rows over their budget; returns the pages chosen as bool."""
        if self.scored is None:
            self.fault("rows over their budget were not scored")
            shape = (len(is_sparse), blocks.cache.shape[1], blocks.max_pages)
            return torch.ones(shape, dtype=torch.bool, device=blocks.device)
        scores = self.scored[: len(is_sparse), :, : blocks.max_pages]
        logits = {"scale": attended.scale, "soft_cap": attended.soft_cap}
        if blocks.score == "codes":
            exact = batched_reference.score_codes(attended.query, blocks, **logits)
            limit = score_codes_error(attended)
            if attended.query.is_cuda:
                limit += rounding_of_the_query(attended)
        else:
            exact = batched_reference.score(attended.query, blocks)
            limit = score_error(attended._replace(kv_cache=batched_reference.stored_bounds(blocks)))
        is_scored = (blocks.pages() < blocks.num_pages[:, None, None]) & is_sparse[:, None, None]
        is_estimate = exact.abs() < 2.0**100  # not a page of a group that is not full
        difference = (scores.double() - exact).abs()
        wrong = is_scored & ~(difference <= torch.where(is_estimate, limit, 0.0))
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            self.fault(f"score {at} is {scores[tuple(at)]}, not {exact[tuple(at)]} ± {limit}")
        expected, leads = batched_reference.select(
            scores,
            blocks,
            budget.clamp(max=blocks.max_pages),
            keep_first=self.quest.keep_first_pages,
            keep_newest=self.quest.keep_newest_percent,
        )
        width = int(budget[is_sparse].max())
        listed = pages[: len(is_sparse), :, :width].long()
        is_listed = torch.arange(width, device=blocks.device) < budget[:, None, None]
        is_ascending = (listed[..., 1:] > listed[..., :-1]) | ~is_listed[..., 1:]
        in_range = (listed >= 0) & (listed < blocks.num_pages[:, None, None])
        if not (is_ascending[is_sparse].all() and (in_range | ~is_listed)[is_sparse].all()):
            self.fault("the pages selected are no ascending list of the row's pages")
        places = listed.where(is_listed & in_range, blocks.max_pages)
        chosen = torch.zeros_like(expected[..., :1]).repeat(1, 1, blocks.max_pages + 1)
        chosen.scatter_(2, places, torch.ones_like(places, dtype=torch.bool))
        chosen = chosen[..., :-1]
        wrong_rows = is_sparse & (chosen != expected).flatten(1).any(1)
        if wrong_rows.any():
            at = int(wrong_rows.nonzero()[0])
            differ = (chosen[at] != expected[at]).any(0).nonzero().flatten().tolist()
            self.fault(f"row {at} ({of_requests and of_requests[at]}): pages {differ} are wrong")
        if of_requests is not None:
            size = scores.abs().where(is_scored & is_estimate, 0.0).amax((1, 2)).clamp(min=1e-30)
            relative = torch.where(is_sparse, leads / size, torch.inf).tolist()
            for row, lead in zip(of_requests, relative, strict=True):
                if lead < NEAR_TIE:
                    self.leads.setdefault(row.request_id, []).append((row.seq_len, lead))
        return chosen


def growth(
    operator: str, *tensors: Any, counters: Tensor | None, **options: Any
) -> list[int] | None:
    """Call a decode operator; returns what its counters grew by, None where it has none."""
    before = None if counters is None else counters.clone()
    REAL[operator](*tensors, counters=counters, **options)
    return None if before is None else (counters - before).tolist()


def counts(blocks: Blocks, budget: Tensor, is_sparse: Tensor) -> Tensor:
    """What rows add to the counters, `[5]` int64 on the host, in the order of `counters.Counts`."""
    num_pages = blocks.num_pages
    is_row = blocks.seq_lens > 0
    per_head = [
        (is_sparse & is_row).sum(),
        (~is_sparse & is_row).sum(),
        num_pages[is_sparse].sum(),
        torch.where(is_sparse, budget, num_pages).sum(),
        num_pages.sum(),
    ]
    return torch.stack(per_head).cpu() * blocks.cache.shape[1]
