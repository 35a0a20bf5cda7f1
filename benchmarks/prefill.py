"""Times what QUEST adds to one layer's prefill on a GPU: bounds or codes, which the write makes.

Beside it the same layer as vLLM's FLASH_ATTN has it: its cache write, and FlashAttention 3. Each
time is the median over replays of a CUDA graph that visits several layers in turn. The chunk's
queries, keys and values are views of one product, as in a model.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --cases 1x8K@512K 1x2K/32/32 --json result.json
    python benchmarks/prefill.py --score codes
    python benchmarks/prefill.py --kv-cache-dtype fp8

With fp8 caches, QUEST's time of attention includes the rounding of the query to fp8. In layers of
FLASH_ATTN the model's graph does that, and no time of it is counted.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_peers import PagedFlashAttention3
from gpu_timing import DEVICE, free_memory, time_us
from kernels import Case, Layer, in_k, is_close, layers_for, parse_tokens
from report import print_as_measured, print_machine, write_json
from vllm_quest import ops
from vllm_quest.config import SCORES

CASES = "1x128 1x512 1x2K 4x2K 1x8K 1x8K@32K 1x8K@128K 1x2K/32/32 1x8K/32/32"
DENSE_BLOCK_TOKENS = 16  # FLASH_ATTN's


@dataclass(frozen=True)
class Chunk:
    """The last `chunk_tokens` of every request's context, which are prefilled in one step."""

    cache: Case
    chunk_tokens: int

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return self.cache.rows * self.chunk_tokens

    @property
    def has_earlier_tokens(self) -> bool:
        return self.cache.context_tokens > self.chunk_tokens

    def __str__(self) -> str:
        case = self.cache
        of = f" of {in_k(case.context_tokens)}" if self.has_earlier_tokens else ""
        return f"{case.rows} x {in_k(self.chunk_tokens)}{of}, {case.heads}/{case.kv_heads}"

    def slots(self, block_table: Tensor, block_tokens: int) -> Tensor:
        """Where the chunk's tokens are stored, request after request: `[tokens]` int64."""
        first = self.cache.context_tokens - self.chunk_tokens
        positions = torch.arange(first, self.cache.context_tokens, device=DEVICE)
        blocks = block_table[:, positions // block_tokens].long()
        return (blocks * block_tokens + positions % block_tokens).flatten()


class Prefill:
    """One chunk's queries, keys and values, and what FLASH_ATTN's attention to them comes to."""

    def __init__(self, chunk: Chunk) -> None:
        case = chunk.cache
        self.chunk = chunk
        heads = [case.heads, case.kv_heads, case.kv_heads]
        qkv = torch.randn(chunk.tokens, sum(heads), case.head_size, device=DEVICE).to(case.dtype)
        self.query, self.key, self.value = qkv.split(heads, dim=1)
        self.out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        self.one = torch.ones((), device=DEVICE)
        self.fp8_query = self.rounded_query() if case.is_fp8 else None

    def rounded_query(self) -> Tensor:
        """The query as `vllm_quest/platforms/cuda.py` hands it to FlashAttention with fp8."""
        from vllm._custom_ops import scaled_fp8_quant

        return scaled_fp8_quant(self.query.flatten(1), self.one)[0].view(self.query.shape)

    def attention(self, block_tokens: int) -> PagedFlashAttention3:
        return PagedFlashAttention3(self.chunk.cache, block_tokens, self.chunk.chunk_tokens)


class DenseLayer:
    """FLASH_ATTN's cache of one layer, its cache write and its attention."""

    def __init__(self, prefill: Prefill) -> None:
        chunk, case, tokens = prefill.chunk, prefill.chunk.cache, DENSE_BLOCK_TOKENS
        self.prefill = prefill
        blocks = case.rows * -(-case.context_tokens // tokens)
        shape = (blocks, tokens, case.kv_heads, 2 * case.head_size)
        cache = torch.empty(shape, dtype=case.dtype, device=DEVICE).normal_().to(case.cache_dtype)
        self.keys, self.values = cache.split(case.head_size, dim=-1)
        self.block_table = torch.randperm(blocks, device=DEVICE).int().view(case.rows, -1)
        self.slots = chunk.slots(self.block_table, tokens)
        self.attention = prefill.attention(tokens)

    def write(self) -> None:
        from vllm._custom_ops import reshape_and_cache_flash

        prefill, dtype, cache = self.prefill, "auto", (self.keys, self.values)
        if prefill.chunk.cache.is_fp8:
            dtype, cache = "fp8", (self.keys.view(torch.uint8), self.values.view(torch.uint8))
        arguments = (prefill.key, prefill.value, *cache, self.slots)
        reshape_and_cache_flash(*arguments, dtype, prefill.one, prefill.one)

    def attend(self) -> None:
        prefill = self.prefill
        query = prefill.query if prefill.fp8_query is None else prefill.fp8_query
        self.attention.attend(query, self.keys, self.values, self.block_table, prefill.out)


class QuestLayer:
    """QUEST's cache of one layer, the write of keys, values and bounds, and FLASH_ATTN's attention.

    As in `vllm_quest/platforms/cuda.py`.
    """

    def __init__(self, prefill: Prefill) -> None:
        chunk, case = prefill.chunk, prefill.chunk.cache
        self.prefill = prefill
        self.layer = Layer(case)
        self.slots = chunk.slots(self.layer.block_table, case.block_tokens)
        tokens = self.layer.kv_cache[:, :, : case.block_tokens].transpose(1, 2)
        self.keys, self.values = tokens.split(case.head_size, dim=-1)
        self.attention = prefill.attention(case.block_tokens)

    def write(self) -> None:
        prefill, kv_cache = self.prefill, self.layer.kv_cache
        case = prefill.chunk.cache
        ops.write_kv(
            prefill.key,
            prefill.value,
            kv_cache,
            self.slots,
            page_size=case.page_size,
            score=case.score,
            scales=ops.KvScales(prefill.one, prefill.one) if case.is_fp8 else None,
        )

    def attend(self) -> None:
        prefill = self.prefill
        query = prefill.rounded_query() if prefill.chunk.cache.is_fp8 else prefill.query
        self.attention.attend(query, self.keys, self.values, self.layer.block_table, prefill.out)


def times_us(
    make: Callable[[Prefill], DenseLayer | QuestLayer], prefill: Prefill
) -> tuple[float, float, Tensor]:
    """The cache write's time and the attention's, and what the attention came to."""
    case = prefill.chunk.cache
    num_layers = layers_for(case, prefill.chunk.tokens * case.row_bytes)
    layers = [make(prefill) for _ in range(num_layers)]
    write = time_us(lambda i: layers[i].write(), num_layers)
    attend = time_us(lambda i: layers[i].attend(), num_layers)
    return write, attend, prefill.out.clone()


def run(chunk: Chunk) -> dict[str, Any]:
    """Time one case.

    Raises:
        RuntimeError: the outputs differ, so that the times would mean nothing. (Only the chunk's
            keys and values are the same in both caches: not compared where there are earlier ones.)
    """
    prefill = Prefill(chunk)
    dense_write, dense_attend, expected = times_us(DenseLayer, prefill)
    free_memory()
    quest_write, quest_attend, out = times_us(QuestLayer, prefill)
    free_memory()
    if not chunk.has_earlier_tokens and not is_close(out, expected):
        raise RuntimeError(f"{chunk}: QUEST's output differs from FLASH_ATTN's")
    return {
        "requests x chunk, heads": str(chunk),
        "score": chunk.cache.score,
        "cache": str(chunk.cache.cache_dtype).removeprefix("torch."),
        "FLASH_ATTN write µs": dense_write,
        "QUEST write µs": quest_write,
        "FLASH_ATTN attention µs": dense_attend,
        "QUEST attention µs": quest_attend,
        "bounds % of attention": 100 * (quest_write - dense_write) / dense_attend,
        "layer ratio": (dense_write + dense_attend) / (quest_write + quest_attend),
    }


def parse_chunk(text: str) -> Chunk:
    pattern = r"(\d+)x(\d+K?)(?:@(\d+K?))?(?:/(\d+)/(\d+))?"
    match = re.fullmatch(pattern, text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected REQUESTSxTOKENS, such as 1x8K, 1x8K@32K or 1x8K/32/32, got {text}"
        )
    requests, chunk, context, heads, kv_heads = match.groups()
    chunk_tokens = parse_tokens(chunk)
    context_tokens = parse_tokens(context or chunk)
    if context_tokens < chunk_tokens:
        raise argparse.ArgumentTypeError(f"{text}: the context is shorter than the chunk")
    cache = Case(
        rows=int(requests),
        context_tokens=context_tokens,
        captured_tokens=context_tokens,
        heads=int(heads or 32),
        kv_heads=int(kv_heads or 8),
        head_size=128,
        budget_tokens=2048,
        page_size=16,
        block_tokens=128,
        dtype=torch.bfloat16,
    )
    return Chunk(cache, chunk_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        type=parse_chunk,
        default=[*map(parse_chunk, CASES.split())],
        metavar="REQUESTSxTOKENS[@CONTEXT][/HEADS/KV_HEADS]",
        help="tokens prefilled in one step for each request, and the context that they end "
        f"(default: {CASES})",
    )
    parser.add_argument(
        "--score", choices=SCORES, default="minmax", help="what the write makes for each page"
    )
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/prefill.py needs a GPU")
    torch.manual_seed(0)
    print_machine()
    settings = {"score": args.score, "is_fp8": args.kv_cache_dtype == "fp8"}
    chunks = [replace(chunk, cache=replace(chunk.cache, **settings)) for chunk in args.cases]
    rows = print_as_measured(map(run, chunks))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
