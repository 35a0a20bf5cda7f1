"""Dense attention of one decode step, as vLLM 0.32's other backends call it in a full CUDA graph.

FLASH_ATTN calls FlashAttention 3. On a Hopper GPU, FLASHINFER calls one of two kernels: XQA where
vLLM finds the package flashinfer-cubin or reaches NVIDIA's file server, otherwise FlashInfer's own
FlashAttention 2, planned by a wrapper. Both are compiled at first use, in a minute or two.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpu_timing import DEVICE

if TYPE_CHECKING:
    from kernels import Case


class DenseLayers:
    """The caches of several layers, in the layout that all peers take, and a step's arguments."""

    def __init__(self, case: "Case", num_layers: int) -> None:
        self.case = case
        pages = case.rows * case.pages
        sizes = (pages, case.page_size, case.kv_heads, 2 * case.head_size)
        caches = [self.random_cache(sizes) for _ in range(num_layers)]
        self.keys_values = [cache.split(case.head_size, dim=-1) for cache in caches]
        self.block_tables = [
            torch.randperm(pages, device=DEVICE).int().view(case.rows, -1)
            for _ in range(num_layers)
        ]
        self.query = torch.randn(case.rows, case.heads, case.head_size, device=DEVICE).to(
            case.dtype
        )
        self.out = torch.empty_like(self.query)
        self.seq_lens = torch.full((case.rows,), case.context_tokens, dtype=torch.int32).to(DEVICE)
        self.key = torch.randn(case.rows, case.kv_heads, case.head_size, device=DEVICE).to(
            case.dtype
        )
        self.slots = [case.newest_slots(table, case.page_size) for table in self.block_tables]
        self.one = torch.ones((), device=DEVICE)
        self.fp8_query: Tensor | None = None
        if case.is_fp8:  # as vLLM's layer hands it to FLASH_ATTN, where the model's graph makes it
            self.fp8_query = self.query.to(case.cache_dtype)

    def random_cache(self, sizes: tuple[int, ...]) -> Tensor:
        """Standard normal keys and values: `[pages, page_size, kv_heads, 2 * head_size]`."""
        cache = torch.empty(sizes, dtype=self.case.cache_dtype, device=DEVICE)
        for part in cache.split(1 + (1 << 28) // cache[0].numel()):
            part.copy_(torch.randn(part.shape, dtype=self.case.dtype, device=DEVICE))
        return cache

    def write(self, i: int) -> None:
        """Store a step's keys and values, as vLLM's dense backends do."""
        from vllm._custom_ops import reshape_and_cache_flash

        keys, values = self.keys_values[i]
        dtype = "auto"
        if self.case.is_fp8:
            dtype, keys, values = "fp8", keys.view(torch.uint8), values.view(torch.uint8)
        arguments = (self.key, self.key, keys, values, self.slots[i])
        reshape_and_cache_flash(*arguments, dtype, self.one, self.one)

    def __len__(self) -> int:
        return len(self.keys_values)


class PagedFlashAttention3:
    """FlashAttention 3 for one shape of batch: `vllm/v1/attention/backends/flash_attn.py`.

    Every request attends with its last `query_tokens` to `case.context_tokens`, which lie in
    blocks of `block_tokens`. A context is split in `num_splits` at most; 0, as outside CUDA graphs,
    leaves that to the kernel.
    """

    def __init__(
        self, case: "Case", block_tokens: int, query_tokens: int = 1, num_splits: int = 0
    ) -> None:
        from vllm.vllm_flash_attn import get_scheduler_metadata

        starts = torch.arange(case.rows + 1, dtype=torch.int32, device=DEVICE)
        seq_lens = torch.full_like(starts[1:], case.context_tokens)
        shape = {
            "cu_seqlens_q": query_tokens * starts,
            "max_seqlen_q": query_tokens,
            "max_seqlen_k": case.context_tokens,
            "causal": True,
            "num_splits": num_splits,
        }
        schedule = get_scheduler_metadata(
            batch_size=case.rows,
            num_heads_q=case.heads,
            num_heads_kv=case.kv_heads,
            headdim=case.head_size,
            cache_seqlens=seq_lens,
            qkv_dtype=case.cache_dtype,
            page_size=block_tokens,
            **shape,
        )
        self.arguments = shape | {
            "seqused_k": seq_lens,
            "softmax_scale": case.head_size**-0.5,
            "scheduler_metadata": schedule,
            "fa_version": 3,
        }
        if case.is_fp8:
            scales = torch.ones((), device=DEVICE).expand(case.rows, case.kv_heads)
            self.arguments |= {name: scales for name in ("q_descale", "k_descale", "v_descale")}

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, out: Tensor
    ) -> None:
        """query, out: `[rows * query_tokens, heads, head_size]`; keys, values: `[num_blocks,
        block_tokens, kv_heads, head_size]`.
        """
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        tensors = {"q": query, "k": keys, "v": values, "block_table": block_table, "out": out}
        flash_attn_varlen_func(**tensors, **self.arguments)


class FlashAttention3:
    """FLASH_ATTN's decode."""

    MAX_SPLITS = 32  # attention_config.flash_attn_max_num_splits_for_cuda_graph

    def __init__(self, layers: DenseLayers) -> None:
        self.layers = layers
        case = layers.case
        self.kernel = PagedFlashAttention3(case, case.page_size, num_splits=self.MAX_SPLITS)

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be timed here; None if it can."""
        try:
            from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported
        except ImportError as error:
            return str(error)
        return None if is_fa_version_supported(3) else fa_version_unsupported_reason(3)

    def attend(self, i: int) -> None:
        layers = self.layers
        query = layers.query if layers.fp8_query is None else layers.fp8_query
        self.kernel.attend(query, *layers.keys_values[i], layers.block_tables[i], layers.out)


def workspace() -> torch.Tensor:
    """FlashInfer's scratch, as large as vLLM makes it."""
    from vllm import envs

    size = envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE
    return torch.zeros(size, dtype=torch.uint8, device=DEVICE)


class FlashInferXqa:
    """`vllm/v1/attention/backends/flashinfer.py`, FlashInferDecodeKernel.XQA."""

    def __init__(self, layers: DenseLayers) -> None:
        self.layers = layers
        self.workspace = workspace()

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be timed here; None if it can."""
        if torch.cuda.get_device_capability() != (9, 0):
            return "vLLM calls XQA on GPUs of compute capability 9.0 and 12.x"
        return flashinfer_missing()

    def attend(self, i: int) -> None:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        layers, case = self.layers, self.layers.case
        xqa_batch_decode_with_kv_cache(
            query=layers.query,
            kv_cache=layers.keys_values[i],
            workspace_buffer=self.workspace,
            block_tables=layers.block_tables[i],
            seq_lens=layers.seq_lens,
            max_seq_len=case.context_tokens,
            bmm1_scale=case.head_size**-0.5,
            bmm2_scale=1.0,
            out=layers.out,
            kv_layout="NHD",
            q_len_per_req=1,
        )


class FlashInferFA2:
    """`vllm/v1/attention/backends/flashinfer.py`, FIDecode: a wrapper per layer, planned before."""

    def __init__(self, layers: DenseLayers) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self.layers = layers
        case = layers.case
        scratch = workspace()
        starts = torch.arange(case.rows + 1, dtype=torch.int32) * case.pages
        last_page_tokens = case.context_tokens - (case.pages - 1) * case.page_size
        last_page_lens = torch.full((case.rows,), last_page_tokens, dtype=torch.int32)
        self.wrappers = []
        for block_table in layers.block_tables:
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                scratch,
                "NHD",
                use_cuda_graph=True,
                paged_kv_indptr_buffer=torch.empty_like(starts, device=DEVICE),
                paged_kv_indices_buffer=torch.empty_like(block_table.flatten()),
                paged_kv_last_page_len_buffer=torch.empty_like(last_page_lens, device=DEVICE),
                use_tensor_cores=True,
            )
            wrapper.plan(
                indptr=starts,
                indices=block_table.flatten(),
                last_page_len=last_page_lens,
                num_qo_heads=case.heads,
                num_kv_heads=case.kv_heads,
                head_dim=case.head_size,
                page_size=case.page_size,
                sm_scale=case.head_size**-0.5,
                q_data_type=case.dtype,
                kv_data_type=case.dtype,
                o_data_type=case.dtype,
            )
            self.wrappers.append(wrapper)

    @staticmethod
    def missing() -> str | None:
        """Why it cannot be timed here; None if it can."""
        return flashinfer_missing()

    def attend(self, i: int) -> None:
        layers = self.layers
        self.wrappers[i].run(layers.query, layers.keys_values[i], out=layers.out)


def flashinfer_missing() -> str | None:
    """Why FlashInfer cannot be called here; None if it can."""
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


Peer = FlashAttention3 | FlashInferXqa | FlashInferFA2
PEERS: dict[str, type[Peer]] = {
    "FA3": FlashAttention3,
    "FlashInfer XQA": FlashInferXqa,
    "FlashInfer FA2": FlashInferFA2,
}


def write_and_attend(peer: Peer, i: int) -> None:
    """All of a decode step's attention layer."""
    peer.layers.write(i)
    peer.attend(i)


def available_peers() -> list[str]:
    """Names of those that can be timed here; says why of the others."""
    missing = {name: peer.missing() for name, peer in PEERS.items()}
    for name, reason in missing.items():
        if reason:
            print(f"{name}: {reason}")
    return [name for name, reason in missing.items() if reason is None]
