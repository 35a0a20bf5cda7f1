"""Times the CUDA operators for one decode step of one layer, beside dense attention.

Dense attention is what vLLM's FLASH_ATTN and FLASHINFER call on the GPU, see `dense_peers.py`.

Each time is the median over replays of a CUDA graph that visits several layers in turn, so that a
layer's pages have left the L2 cache when it comes around again. `copy` is the bandwidth of a large
device-to-device copy measured first, bytes read and written; `limit` is the time that QUEST's bytes
take at that bandwidth, and the ratio to dense that it would allow.

`total` is attention alone. `layer` is all of a decode step's attention layer: the write of its
keys and values, too, beside which QUEST's attention begins.

    python benchmarks/kernels.py                          # the reference table
    python benchmarks/kernels.py --cases 1x4K 1x512K      # where QUEST starts to pay
    python benchmarks/kernels.py --cases 8x32K/32/32 --page-size 32 --budgets 512 2048 8192
    python benchmarks/kernels.py --cases 1x1K --captured-for 1K 128K --no-dense
    python benchmarks/kernels.py --kv-cache-dtype fp8     # beside FlashAttention 3 alone
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dense_peers import PEERS, DenseLayers, available_peers, write_and_attend
from gpu_timing import COLD_BYTES, DEVICE, copy_bytes_per_us, free_memory, time_us
from report import print_as_measured, print_machine, ratio, write_json
from vllm_quest import layout, ops
from vllm_quest.config import SCORES, Score

REFERENCE_CASES = (
    "1x32K 1x128K 8x32K 8x32K/32/32 8x128K 32x32K 64x16K 8x2K"  # rows x context / heads / KV heads
)
MEMORY_BYTES = 40 << 30
"""What all layers of a case may take together."""


@dataclass(frozen=True)
class Case:
    rows: int
    context_tokens: int
    captured_tokens: int  # that the block table has columns for
    heads: int
    kv_heads: int
    head_size: int
    budget_tokens: int
    page_size: int
    block_tokens: int
    dtype: torch.dtype
    score: Score = "minmax"
    is_fp8: bool = False  # the cache

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.is_fp8 else self.dtype

    @property
    def blocks(self) -> int:
        return -(-self.context_tokens // self.block_tokens)

    @property
    def pages(self) -> int:
        return -(-self.context_tokens // self.page_size)

    @property
    def table_blocks(self) -> int:
        """Columns of the block table."""
        return -(-self.captured_tokens // self.block_tokens)

    @property
    def table_pages(self) -> int:
        return self.table_blocks * self.block_tokens // self.page_size

    @property
    def budget_pages(self) -> int:
        return -(-self.budget_tokens // self.page_size)

    @property
    def is_sparse(self) -> bool:
        return self.pages > self.budget_pages

    @property
    def row_bytes(self) -> int:
        """Of one token's key and value, or of one page's bounds, for all KV heads."""
        return 2 * self.kv_heads * self.head_size * self.cache_dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        return self.rows * self.context_tokens * self.row_bytes

    @property
    def score_bytes(self) -> int:
        unit_tokens, unit_rows = layout.unit(self.page_size, self.score)
        units = -(-self.context_tokens // unit_tokens)
        return self.rows * units * unit_rows * self.row_bytes if self.is_sparse else 0

    @property
    def select_bytes(self) -> int:
        return 4 * self.rows * self.kv_heads * self.pages if self.is_sparse else 0

    @property
    def decode_bytes(self) -> int:
        tokens = min(self.context_tokens, self.budget_tokens)
        return self.rows * tokens * self.row_bytes

    def newest_slots(self, block_table: torch.Tensor, block_tokens: int) -> torch.Tensor:
        """Where the rows' newest tokens are stored, `block * block_tokens + offset`: `[rows]`."""
        block, offset = divmod(self.context_tokens - 1, block_tokens)
        return block_table[:, block].long() * block_tokens + offset

    def __str__(self) -> str:
        return f"{self.rows} x {in_k(self.context_tokens)}, {self.heads}/{self.kv_heads}"


def in_k(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)


def kv_scales(case: Case) -> ops.KvScales | None:
    """Of an fp8 cache: with them, keys and values of variance 1 come to no more than 448."""
    if not case.is_fp8:
        return None
    return ops.KvScales(torch.tensor(0.02, device=DEVICE), torch.tensor(0.03, device=DEVICE))


class Layer:
    """One layer's cache, with random keys and values in scattered blocks, and its block table."""

    def __init__(self, case: Case) -> None:
        blocks, tokens, page_size = case.rows * case.blocks, case.block_tokens, case.page_size
        rows = layout.block_rows(tokens, page_size, case.score)
        sizes = (blocks, case.kv_heads, rows, 2 * case.head_size)
        self.kv_cache = torch.empty(sizes, dtype=case.cache_dtype, device=DEVICE)
        settings: dict[str, Any] = {"page_size": page_size, "score": case.score}
        for part in self.kv_cache.split(1 + (1 << 29) // self.kv_cache[0].nbytes):
            key_sizes = (len(part) * tokens, case.kv_heads, case.head_size)
            key = torch.randn(key_sizes, dtype=case.dtype, device=DEVICE)
            slots = torch.arange(len(key), device=DEVICE)
            ops.write_kv(key, key, part, slots, scales=kv_scales(case), **settings)
        shape = (case.rows, case.table_blocks)
        self.block_table = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
        self.block_table[:, : case.blocks] = torch.randperm(blocks, device=DEVICE).view(
            case.rows, -1
        )


class DecodeStep:
    """The operators' arguments that all layers share, as in a model's decode step."""

    def __init__(self, case: Case, layers: Sequence[Layer]) -> None:
        self.case, self.layers = case, layers
        rows_heads = (case.rows, case.kv_heads)
        seq_lens = torch.full((case.rows,), case.context_tokens, dtype=torch.int32).to(DEVICE)
        budget_pages = torch.full_like(seq_lens, case.budget_pages)
        self.rows = [ops.Rows(layer.block_table, seq_lens, budget_pages) for layer in layers]
        self.query = torch.randn(case.rows, case.heads, case.head_size, device=DEVICE).to(
            case.dtype
        )
        self.key = torch.randn(*rows_heads, case.head_size, device=DEVICE).to(case.dtype)
        self.out = torch.empty_like(self.query)
        self.scores = torch.empty(*rows_heads, case.table_pages, device=DEVICE)
        columns = layout.mass_columns(case.table_pages, case.page_size)
        self.masses = (
            torch.empty(case.rows, case.heads, columns, device=DEVICE)
            if case.score == "codes"
            else None
        )
        self.pages = torch.empty(*rows_heads, case.budget_pages, dtype=torch.int32, device=DEVICE)
        group_size = case.heads // case.kv_heads
        self.uses_clusters = ops.max_cluster_pages(group_size, case.head_size, DEVICE) > 0
        self.scales = kv_scales(case)
        self.attention_settings: dict[str, Any] = {
            "page_size": case.page_size,
            "scale": case.head_size**-0.5,
            "workspace": ops.decode_workspace(group_size, case.head_size, DEVICE),
            "score": case.score,
            "scales": self.scales,
        }
        self.slots = [case.newest_slots(layer.block_table, case.block_tokens) for layer in layers]

    def write_kv(self, i: int) -> None:
        kv_cache, page_size = self.layers[i].kv_cache, self.case.page_size
        settings: dict[str, Any] = {"page_size": page_size, "score": self.case.score}
        settings["scales"] = self.scales
        ops.write_kv(self.key, self.key, kv_cache, self.slots[i], **settings)

    def score(self, i: int) -> None:
        kv_cache, page_size = self.layers[i].kv_cache, self.case.page_size
        if self.masses is not None:
            scale = self.case.head_size**-0.5
            rows = self.rows[i]
            ops.score_codes(
                self.query,
                kv_cache,
                rows,
                self.masses,
                self.scores,
                page_size=page_size,
                scale=scale,
            )
        else:
            ops.score(self.query, kv_cache, self.rows[i], self.scores, page_size=page_size)

    def weigh_pages(self, i: int, masses: torch.Tensor) -> None:
        ops.weigh_pages(
            self.query,
            self.layers[i].kv_cache,
            self.rows[i],
            masses,
            page_size=self.case.page_size,
            scale=self.case.head_size**-0.5,
        )

    def select(self, i: int) -> None:
        ops.select(self.scores, self.rows[i], self.pages, page_size=self.case.page_size)

    def sparse_decode(self, i: int) -> None:
        ops.sparse_decode(
            self.query,
            self.layers[i].kv_cache,
            self.rows[i],
            self.pages,
            self.out,
            **self.attention_settings,
        )

    def cluster_decode(self, i: int, *, follows_write_kv: bool) -> None:
        if self.masses is not None:
            follows_write_kv = False
            self.weigh_pages(i, self.masses)
        ops.cluster_decode(
            self.query,
            self.layers[i].kv_cache,
            self.rows[i],
            self.out,
            far_keys=self.scores.view(torch.int32),
            follows_write_kv=follows_write_kv,
            masses=self.masses,
            **self.attention_settings,
        )

    def three_launches(self, i: int) -> None:
        self.score(i)
        self.select(i)
        self.sparse_decode(i)

    def attention(self, i: int, *, follows_write_kv: bool = False) -> None:
        """As the plugin attends: in one launch where the GPU has clusters."""
        if self.uses_clusters:
            self.cluster_decode(i, follows_write_kv=follows_write_kv)
        else:
            self.three_launches(i)

    def layer(self, i: int) -> None:
        self.write_kv(i)
        self.attention(i, follows_write_kv=True)


def layers_for(case: Case, bytes_per_visit: int) -> int:
    """How many layers make each of them cold, within memory; at least 2."""
    return max(2, min(-(-COLD_BYTES // bytes_per_visit), MEMORY_BYTES // case.dense_bytes, 64))


def run(case: Case, copy: float, peers: Sequence[str] | None) -> dict[str, Any]:
    """Time one case, and those of PEERS that are named; `copy` in bytes per microsecond."""
    coldest = min(filter(None, [case.score_bytes, case.decode_bytes]))
    layers = [Layer(case) for _ in range(layers_for(case, coldest))]
    step = DecodeStep(case, layers)
    step.three_launches(0)  # the later stages' times are of what the earlier ones found
    write = time_us(step.write_kv, len(layers))
    score = time_us(step.score, len(layers))
    select = time_us(step.select, len(layers))
    decode = time_us(step.sparse_decode, len(layers))
    stages = time_us(step.three_launches, len(layers))
    total = time_us(step.attention, len(layers))
    layer = time_us(step.layer, len(layers))
    limit = (case.score_bytes + case.select_bytes + case.decode_bytes) / copy

    row: dict[str, Any] = {
        "rows x context, heads": str(case),
        "score": case.score,
        "cache": "fp8" if case.is_fp8 else str(case.dtype).removeprefix("torch."),
        "page": case.page_size,
        "budget": case.budget_tokens,
        "captured for": in_k(case.captured_tokens),
        "write µs": write,
        "score µs": score,
        "score GB/s": case.score_bytes / score / 1000,
        "score % copy": 100 * case.score_bytes / score / copy,
        "select µs": select,
        "decode µs": decode,
        "decode GB/s": case.decode_bytes / decode / 1000,
        "decode % copy": 100 * case.decode_bytes / decode / copy,
        "3 launches µs": stages,
        "total µs": total,
        "layer µs": layer,
        "limit µs": limit,
    }
    del step, layers
    free_memory()
    if peers is not None:
        dense, dense_layer = dense_us(case, peers)
        flashinfer = [time for name, time in dense.items() if time and not name.startswith("FA3")]
        row |= {f"{name} µs": time for name, time in dense.items()}
        row["ratio"] = ratio(dense["FA3"], total)
        row["limit"] = ratio(dense["FA3"], limit)
        row["FA3 layer µs"] = dense_layer["FA3"]
        row["layer ratio"] = ratio(dense_layer["FA3"], layer)
        row["FlashInfer ratio"] = ratio(min(flashinfer, default=None), total)
        if case.is_fp8:
            in_16_bits, _ = dense_us(replace(case, is_fp8=False), ["FA3"])
            row["FA3 16 bits µs"] = in_16_bits["FA3"]
            row["ratio to 16 bits"] = ratio(in_16_bits["FA3"], total)
    return row


def dense_us(case: Case, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of each of PEERS, alone and with the write of keys and values.

    None of those not named, or that cannot run the case.

    Raises:
        RuntimeError: the outputs differ, so that the times would mean nothing.
    """
    layers = DenseLayers(case, layers_for(case, case.dense_bytes))
    layers.write(0)  # so that writing it again changes no output
    expected: torch.Tensor | None = None
    alone: dict[str, float | None] = dict.fromkeys(PEERS)
    with_write: dict[str, float | None] = dict.fromkeys(PEERS)
    for name in names:
        try:
            peer = PEERS[name](layers)
            peer.attend(0)
        except (OSError, RuntimeError, ValueError) as error:  # OSError: sources left out
            print(f"{name}, {case}: {str(error).strip().splitlines()[0]}")
            continue
        if expected is None:
            expected = layers.out.clone()
        elif not is_close(layers.out, expected):
            raise RuntimeError(f"{name}, {case}: its output differs from {names[0]}'s")
        alone[name] = time_us(peer.attend, len(layers))
        with_write[name] = time_us(partial(write_and_attend, peer), len(layers))
        del peer
    del layers
    free_memory()
    return alone, with_write


def is_close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs differ by no more than roundings to bf16 do, some 0.3%."""
    difference = (out.float() - expected.float()).norm() / expected.float().norm()
    return difference.item() < 0.01


def parse_tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)(K?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected tokens, such as 2048 or 2K, got {text}")
    return int(match[1]) << (10 if match[2] else 0)


def parse_case(
    text: str, args: argparse.Namespace, budget_tokens: int, captured_tokens: int
) -> Case:
    """A case of the command line; `captured_tokens` is at least its context."""
    match = re.fullmatch(r"(\d+)x(\d+K?)(?:/(\d+)/(\d+))?", text)
    if match is None:
        raise SystemExit(f"--cases: expected ROWSxTOKENS or ROWSxTOKENS/HEADS/KV_HEADS, got {text}")
    rows, context, heads, kv_heads = match.groups()
    context_tokens = parse_tokens(context)
    return Case(
        rows=int(rows),
        context_tokens=context_tokens,
        captured_tokens=max(captured_tokens, context_tokens),
        heads=int(heads or args.heads),
        kv_heads=int(kv_heads or args.kv_heads),
        head_size=args.head_size,
        budget_tokens=budget_tokens,
        page_size=args.page_size,
        block_tokens=args.block_size,
        dtype=getattr(torch, args.dtype),
        score=args.score,
        is_fp8=args.kv_cache_dtype == "fp8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=REFERENCE_CASES.split(),
        metavar="ROWSxTOKENS[/HEADS/KV_HEADS]",
        help="decode rows and the context that each has (default: %(default)s)",
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[2048], metavar="TOKENS")
    parser.add_argument(
        "--captured-for",
        nargs="+",
        type=parse_tokens,
        default=[0],
        metavar="TOKENS",
        help="longest context that the block table has room for, as a CUDA graph of a model so "
        "long has it (default: the case's context)",
    )
    parser.add_argument("--score", choices=SCORES, default="minmax")
    parser.add_argument("--page-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of QUEST's vLLM blocks")
    parser.add_argument("--heads", type=int, default=32, help="query heads of cases without any")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads of cases without any")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="fp8: beside FlashAttention 3 with fp8, and with 16 bits (default: %(default)s)",
    )
    parser.add_argument(
        "--no-dense", action="store_true", help="leave out FlashAttention 3 and FlashInfer"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a GPU; see cpu_ops.py for the CPU")

    torch.manual_seed(0)
    print_machine()
    print(f"{args.dtype}, head size {args.head_size}, KV cache {args.kv_cache_dtype}")
    copy = copy_bytes_per_us()
    free_memory()
    print(f"copy: {copy / 1000:.0f} GB/s")
    peers = None if args.no_dense else available_peers()
    if args.kv_cache_dtype == "fp8" and peers:
        peers = [name for name in peers if name == "FA3"]
    cases = itertools.product(args.cases, args.budgets, args.captured_for)
    rows = print_as_measured(
        run(parse_case(text, args, budget, captured), copy, peers)
        for text, budget, captured in cases
    )
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
