"""Every decode row of a worker, compared with the reference while the engine serves.

A *row* is one query token in one layer's decode. Its length, budget, blocks and slots must be those
that the scheduler told of the request (`ledger`), the bounds of its pages those of the keys beside
them, its pages the best by their scores, its output within the derived tolerance, and the counters
exact. Faults are kept, not raised, so that an engine can go on and say all of them.

CUDA graphs replay operators out of sight: of such steps lengths, budgets, blocks and slots are
checked, and what they stored is when a later step reads it without a graph.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from unittest import mock

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
from vllm_quest import ops, reference
from vllm_quest.config import GROUP_TOKENS, QuestConfig
from vllm_quest.impl import QuestImpl
from vllm_quest.layers import is_full_attention
from vllm_quest.metadata import QuestMetadata, QuestMetadataBuilder

from .ledger import Ledger, budget_pages

MAX_FAULTS = 20

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
    block_tokens: int


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
    """Rows whose operators a CUDA graph ran, out of sight; their plans were checked."""

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
    rows: dict[str, list[Row]] = field(default_factory=dict)  # by layer
    filled: dict[str, dict[int, int]] = field(default_factory=dict)
    scored: tuple[Tensor, int] | None = None

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
        self.rows.clear()
        self.seen.clear()
        self.filled.clear()
        try:
            return execute(scheduled, *rest, **named)
        finally:
            self.in_step, self.layer = False, ""
            hidden = self.rows.keys() - self.seen
            self.totals.rows_in_graphs += sum(len(self.rows[layer]) for layer in hidden)

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
        for layer in builder.layer_names:
            self.rows[layer], self.filled[layer] = rows, filled

    def compare_rows(self, found: ops.Rows, rows: list[Row], *, is_dense: bool = False) -> None:
        """Lengths, budgets and blocks."""
        max_pages = -(-self.runner.max_model_len // self.quest.page_size)
        found_lens, found_budgets = found.seq_lens.tolist(), found.budget_pages.tolist()
        block_tokens = found.block_table.shape[1] and self.block_tokens()
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
        if not self.in_step or not is_full_attention(layer):
            return real(layer, *args, **named)
        self.layer, self.cursor = layer.layer_name, 0
        self.seen.add(self.layer)
        out = real(layer, *args, **named)
        if layer.layer_name in self.rows:
            rows = self.rows[layer.layer_name]
            if self.cursor != len(rows):
                self.fault(f"{self.cursor} rows were decoded of {len(rows)}")
        self.layers += 1
        self.layer = ""
        return out

    def take_rows(self, found: ops.Rows) -> list[Row] | None:
        """The requests' rows for a call of an operator; None in layers of a draft head."""
        if self.layer not in self.rows:
            return None
        rows = self.rows[self.layer][self.cursor : self.cursor + len(found)]
        self.cursor += len(found)
        self.compare_rows(found, rows, is_dense=self.layers < self.quest.dense_layers)
        return rows

    # ---- operators

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        *,
        page_size: int,
        score: Any,
    ) -> None:
        block_tokens = reference.tokens_per_block(kv_cache, page_size, score)
        on_host = slots.cpu()[: len(key)]
        is_real = on_host >= 0
        written = on_host[is_real]
        numbers, place = torch.unique(written // block_tokens, return_inverse=True)
        expected = kv_cache[numbers.to(kv_cache.device)].cpu()
        REAL["write_kv"](key, value, kv_cache, slots, page_size=page_size, score=score)
        found = kv_cache[numbers.to(kv_cache.device)].cpu()
        keys_values = torch.cat([key, value], dim=-1).cpu()[: len(on_host)][is_real]
        expected[place, :, written % block_tokens] = keys_values
        self.totals.writes += 1
        table = torch.zeros(1, 1, dtype=torch.int64)
        blocks = Blocks(expected, numbers, table, table[0], page_size, score)
        filled = torch.zeros(len(numbers), dtype=torch.int64)
        filled.scatter_reduce_(0, place, written % block_tokens + 1, "amax")
        if score == "codes":
            ends = torch.zeros(len(numbers), block_tokens // GROUP_TOKENS, dtype=torch.bool)
            is_end = written % GROUP_TOKENS == GROUP_TOKENS - 1
            ends[place[is_end], written[is_end] % block_tokens // GROUP_TOKENS] = True
            codes = expected[:, :, block_tokens:].unflatten(2, (ends.shape[1], -1))
            found_codes = found[:, :, block_tokens:].unflatten(2, (ends.shape[1], -1))
            block, group = ends.nonzero(as_tuple=True)
            codes[block, :, group] = found_codes[block, :, group]
            differ = batched_reference.codes_differ(blocks, filled)
            if (differ & ends.flatten()).any():
                self.fault("codes are not those of the keys written")
        else:
            right = batched_reference.bounds(blocks, filled)
            first = torch.arange(0, block_tokens, page_size)
            is_touched = (first < filled[:, None])[:, None, :, None]
            stored = batched_reference.stored_bounds(blocks)
            stored.copy_(right.where(is_touched, stored))
            if score != "minmax":
                found_bounds = found[:, :, block_tokens:]
                error = bounds_error(expected[:, :, :block_tokens], page_size)
                if ((found_bounds - stored).abs() > error)[is_touched.expand_as(stored)].any():
                    self.fault("bounds are not those of the keys written")
                stored.copy_(found_bounds.where(is_touched, stored))
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            self.fault("write_kv stored other bytes than those of the reference")

    def score(
        self, query: Tensor, kv_cache: Tensor, rows: ops.Rows, scores: Tensor, *, page_size: int
    ) -> None:
        REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        self.scored = scores, len(rows)

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
        self.scored = scores, len(rows)

    def sparse_decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        **options: Any,
    ) -> None:
        counters = options.get("counters")
        before = None if counters is None else counters.clone()
        REAL["sparse_decode"](query, kv_cache, rows, pages, out, **options)
        self.check(query, kv_cache, rows, pages, out, before, **options)
        self.scored = None

    def cluster_decode(
        self, query: Tensor, kv_cache: Tensor, rows: ops.Rows, out: Tensor, **options: Any
    ) -> None:
        counters = options.get("counters")
        before = None if counters is None else counters.clone()
        REAL["cluster_decode"](query, kv_cache, rows, out, **options)
        page_size, kind = options["page_size"], options.get("score", "minmax")
        block_tokens = reference.tokens_per_block(kv_cache, page_size, kind)
        max_pages = rows.block_table.shape[1] * block_tokens // page_size
        scores = torch.empty(len(rows), kv_cache.shape[1], max_pages, device=query.device)
        pages = torch.zeros_like(scores, dtype=torch.int32)
        if kind == "codes":
            logits = {name: options[name] for name in ("page_size", "scale", "soft_cap")}
            masses = torch.empty_like(options["masses"])
            REAL["score_codes"](query, kv_cache, rows, masses, scores, **logits)
        else:
            REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        kept = {name: value for name, value in options.items() if name.startswith("keep_")}
        REAL["select"](scores, rows, pages, page_size=page_size, **kept)
        self.scored = scores, len(rows)
        self.check(query, kv_cache, rows, pages, out, before, **options)
        self.scored = None

    def check(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        pages: Tensor,
        out: Tensor,
        counters_before: Tensor | None,
        *,
        page_size: int,
        scale: float,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
        counters: Tensor | None = None,
        score: Any = "minmax",
        **_: Any,
    ) -> None:
        """Compare one call of a decode operator, all rows at once."""
        of_requests = self.take_rows(rows)
        blocks = Blocks.of(kv_cache, rows, page_size, score)
        self.check_stored(blocks)
        budget = rows.budget_pages.cpu().long()
        is_sparse = blocks.num_pages > budget
        shape = (len(rows), kv_cache.shape[1], blocks.max_pages)
        is_attended = torch.ones(shape, dtype=torch.bool)
        attended = Attended(query, blocks.cache, rows, scale, soft_cap, sinks, blocks.block_tokens)
        if is_sparse.any():
            chosen = self.check_choice(attended, blocks, pages, is_sparse, budget, of_requests)
            is_attended = chosen.where(is_sparse[:, None, None], is_attended)
        logits = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
        exact, limit = batched_reference.attention(query, blocks, is_attended, **logits)
        difference = (out.cpu().double() - exact).abs()
        if not (difference <= limit).all():
            at = int((difference - limit).flatten(1).amax(1).nan_to_num(torch.inf).argmax())
            self.fault(
                f"row {at} ({of_requests and of_requests[at]}): output is off by "
                f"{float(difference[at].amax()):.3g}; allowed: {float(limit[at].amin()):.3g}"
            )
        if counters is not None and counters_before is not None:
            self.check_counters(blocks, budget, is_sparse, (counters - counters_before).tolist())
        if of_requests is None:
            self.totals.draft_rows += len(rows)
        else:
            self.totals.rows += len(rows)
            self.totals.sparse_rows += int(is_sparse.sum())
            self.totals.pages += int(blocks.num_pages[is_sparse].sum())

    def check_stored(self, blocks: Blocks) -> None:
        """Bounds, or codes, are those of the keys beside them."""
        filled = self.filled.get(self.layer)
        if filled is None:  # a draft head's: the rows are all that is known
            filled = {}
            starts = torch.arange(blocks.table.shape[1]) * blocks.block_tokens
            for place, start, seq_len in zip(
                blocks.table.flatten().tolist(),
                starts.repeat(len(blocks.table)).tolist(),
                blocks.seq_lens.repeat_interleave(len(starts)).tolist(),
                strict=True,
            ):
                number = int(blocks.numbers[place])
                tokens = min(blocks.block_tokens, seq_len - start)
                filled[number] = max(filled.get(number, 0), tokens)
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
        found = batched_reference.stored_bounds(blocks)
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
            return torch.ones(len(is_sparse), blocks.cache.shape[1], blocks.max_pages).bool()
        scores = self.scored[0][: len(is_sparse), :, : blocks.max_pages].cpu()
        logits = {"scale": attended.scale, "soft_cap": attended.soft_cap}
        if blocks.score == "codes":
            exact = batched_reference.score_codes(attended.query, blocks, **logits)
            limit = score_codes_error(attended)
            if attended.query.is_cuda:
                limit += rounding_of_the_query(attended)
        else:
            exact = batched_reference.score(attended.query, blocks)
            limit = score_error(attended._replace(kv_cache=batched_reference.stored_bounds(blocks)))
        page = torch.arange(blocks.max_pages)
        is_scored = (page < blocks.num_pages[:, None, None]) & is_sparse[:, None, None]
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
        chosen = torch.zeros(len(is_sparse), blocks.cache.shape[1], blocks.max_pages + 1).bool()
        width = int(budget[is_sparse].max())
        listed = pages[: len(is_sparse), :, :width].cpu().long()
        is_listed = torch.arange(width) < budget[:, None, None]
        is_ascending = (listed[..., 1:] > listed[..., :-1]) | ~is_listed[..., 1:]
        in_range = (listed >= 0) & (listed < blocks.num_pages[:, None, None])
        if not (is_ascending[is_sparse].all() and (in_range | ~is_listed)[is_sparse].all()):
            self.fault("the pages selected are no ascending list of the row's pages")
        places = listed.where(is_listed & in_range, blocks.max_pages)
        chosen.scatter_(2, places, torch.ones_like(places, dtype=torch.bool))
        chosen = chosen[..., :-1]
        wrong_rows = is_sparse & (chosen != expected).flatten(1).any(1)
        if wrong_rows.any():
            at = int(wrong_rows.nonzero()[0])
            differ = (chosen[at] != expected[at]).any(0).nonzero().flatten().tolist()
            self.fault(f"row {at} ({of_requests and of_requests[at]}): pages {differ} are wrong")
        if of_requests is not None:
            size = scores.abs().where(is_scored & is_estimate, 0.0).amax((1, 2)).clamp(min=1e-30)
            relative = (leads / size).tolist()
            for at, row in enumerate(of_requests):
                if is_sparse[at] and relative[at] < NEAR_TIE:
                    self.leads.setdefault(row.request_id, []).append((row.seq_len, relative[at]))
        return chosen

    def check_counters(
        self, blocks: Blocks, budget: Tensor, is_sparse: Tensor, found: list[int]
    ) -> None:
        """A call adds exactly what its rows read, per KV head."""
        num_pages = blocks.num_pages
        is_row = blocks.seq_lens > 0
        expected = [
            int((is_sparse & is_row).sum()),
            int((~is_sparse & is_row).sum()),
            int(num_pages[is_sparse].sum()),
            int(torch.where(is_sparse, budget, num_pages).sum()),
            int(num_pages.sum()),
        ]
        expected = [blocks.cache.shape[1] * count for count in expected]
        if found != expected:
            self.fault(f"counters grew by {found}, not {expected}")


NEAR_TIE = 1e-4
"""Leads of scores, relative to the largest of their row, that are kept."""


def start_checks(worker: Any) -> None:
    """Check every step of a worker from now on."""
    runner = worker.model_runner
    checker = Checker(runner, QuestConfig.from_vllm(worker.vllm_config))
    patches = contextlib.ExitStack()
    worker.checker, worker.patches = checker, patches
    build, forward = QuestMetadataBuilder.build, QuestImpl.forward
    execute = runner.execute_model

    def checked_build(builder: Any, *args: Any, **named: Any) -> QuestMetadata:
        metadata = build(builder, *args, **named)
        if checker.in_step and builder.planner is not None:
            checker.plan(builder, metadata)
        return metadata

    def checked_forward(impl: Any, layer: Any, *args: Any, **named: Any) -> Tensor:
        real = functools.partial(forward, impl)
        return checker.forward(real, layer, *args, **named)

    def checked_execute(*args: Any, **named: Any) -> Any:
        return checker.step(execute, *args, **named)

    replaced = ("write_kv", "score", "score_codes", "sparse_decode", "cluster_decode")
    operators = {name: getattr(checker, name) for name in replaced}
    patches.enter_context(mock.patch.multiple(ops, **operators))
    patches.enter_context(mock.patch.object(QuestMetadataBuilder, "build", checked_build))
    patches.enter_context(mock.patch.object(QuestImpl, "forward", checked_forward))
    patches.enter_context(mock.patch.object(runner, "execute_model", checked_execute))
    if hasattr(runner, "prepare_inputs"):  # the V2 runner
        prepare = runner.prepare_inputs

        def noted_prepare(*args: Any, **named: Any) -> Any:
            batch = prepare(*args, **named)
            checker.order = list(batch.req_ids)
            return batch

        patches.enter_context(mock.patch.object(runner, "prepare_inputs", noted_prepare))


def stop_checks(worker: Any) -> None:
    """Leave the process as it was."""
    worker.patches.close()


def take_report(worker: Any) -> dict[str, Any]:
    """What was checked and found since the last report."""
    checker = worker.checker
    report = {
        "totals": asdict(checker.totals),
        "faults": checker.faults,
        "leads": checker.leads,
        "resumed": checker.ledger.resumed,
    }
    checker.totals, checker.faults, checker.leads = Totals(), [], {}
    checker.ledger.resumed = {}
    return report
