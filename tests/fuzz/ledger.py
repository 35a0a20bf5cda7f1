"""What each request has, as the scheduler told this worker: no batch's tables are asked."""

from dataclasses import dataclass, field
from typing import Any

from vllm_quest.budgets import SERVER_DEFAULT, requested_budget


@dataclass
class Request:
    """One request, as of the step that is scheduled."""

    num_prompt_tokens: int
    num_prefill_tokens: int
    """Tokens that are read as a prompt is: the V2 runner counts the answer of a request that starts
    anew among them."""

    token_budget: int
    """Its own, or SERVER_DEFAULT."""

    blocks: list[list[int]]
    """By KV cache group: the blocks that its tokens lie in, in their order."""

    num_known: int
    """Tokens of its prompt and its answer, drafts not counted."""

    num_computed: int = 0
    """Tokens whose keys were stored before this step."""

    num_scheduled: int = 0
    """Tokens of this step; 0 if it takes no part."""

    @property
    def is_reading_prompt(self) -> bool:
        """Whether this step's first token is of the prompt."""
        return self.num_computed < self.num_prefill_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether this step takes the newest token, and drafts if any."""
        return not self.is_reading_prompt and self.num_computed == self.num_known - 1

    @property
    def num_stored(self) -> int:
        """Tokens whose keys are stored once this step has written its own."""
        return self.num_computed + self.num_scheduled

    def written_blocks(self, group: int, block_tokens: int) -> set[int]:
        """The blocks that this step writes to."""
        first, last = self.num_computed // block_tokens, (self.num_stored - 1) // block_tokens
        return set(self.blocks[group][first : last + 1])


@dataclass
class Ledger:
    """All requests of an engine, kept up from what the scheduler sends to each worker."""

    requests: dict[str, Request] = field(default_factory=dict)

    resumed: dict[str, int] = field(default_factory=dict)
    """Requests that started anew, and the tokens of their answers before they first did."""

    def update(self, step: Any) -> None:
        """Take in a step, a `SchedulerOutput`."""
        for request_id in step.finished_req_ids:
            self.requests.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            extra = new.sampling_params.extra_args if new.sampling_params else None
            known = new.prefill_token_ids  # of the V2 runner, which is told resumed ones anew
            self.requests[new.req_id] = Request(
                num_prompt_tokens=new.prompt_len,
                num_prefill_tokens=new.prompt_len if known is None else len(known),
                token_budget=requested_budget(extra),
                blocks=[list(blocks) for blocks in new.block_ids],
                num_known=new.prompt_len if known is None else len(known),
                num_computed=new.num_computed_tokens,
            )
            if known is not None and len(known) > new.prompt_len:
                self.resumed.setdefault(new.req_id, len(known) - new.prompt_len)
        cached = step.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            request = self.requests[request_id]
            request.num_computed = cached.num_computed_tokens[index]
            request.num_known = request.num_prompt_tokens + cached.num_output_tokens[index]
            blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                request.blocks = [list(group) for group in blocks]
                self.resumed.setdefault(request_id, cached.num_output_tokens[index])
            elif blocks is not None:
                for own, new_blocks in zip(request.blocks, blocks, strict=True):
                    own.extend(new_blocks)
        for request_id, request in self.requests.items():
            request.num_scheduled = step.num_scheduled_tokens.get(request_id, 0)

    def scheduled(self) -> list[Request]:
        """The requests of this step, in no particular order."""
        return [request for request in self.requests.values() if request.num_scheduled]

    def filled(self, group: int, block_tokens: int) -> dict[int, int]:
        """Tokens that each block of this step's requests holds."""
        filled: dict[int, int] = {}
        for request in self.scheduled():
            for index, block in enumerate(request.blocks[group]):
                tokens = min(block_tokens, request.num_stored - index * block_tokens)
                if tokens <= 0:
                    break
                filled[block] = max(filled.get(block, 0), tokens)
        return filled


def budget_pages(request: Request, server_budget: int, page_size: int) -> int | None:
    """Pages that a request's decode rows may attend to; None for no limit."""
    tokens = server_budget if request.token_budget == SERVER_DEFAULT else request.token_budget
    return None if tokens == -1 else -(-tokens // page_size)
