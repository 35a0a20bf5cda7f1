"""The stages of QUEST in one layer, in the paper's order: write, score, select, attend."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_quest import kv_page, ops
from vllm_quest.config import QuestConfig
from vllm_quest.decode_rows import DecodeRows
from vllm_quest.metadata import QuestMetadata
from vllm_quest.platforms import this_platform
from vllm_quest.support import OTHER_BACKEND


class QuestImpl(AttentionImpl[QuestMetadata]):
    """One attention layer. Prefill and sliding windows are the platform backend's work."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise ValueError(f"QUEST cannot serve this model: it uses ALiBi; {OTHER_BACKEND}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = logits_soft_cap or 0.0
        self.quest = QuestConfig.active()
        self._is_dense_layer: bool | None = None
        self.has_own_cache = kv_sharing_target_layer_name is None
        self.has_window = sliding_window is not None
        self.platform = this_platform()
        self.dense = self.platform.DenseImpl(
            num_heads,
            head_size,
            scale,
            self.num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
        )

    def get_impl_variants(self) -> tuple[AttentionImpl[Any], ...]:
        """FLASH_ATTN's metadata builder asks for the windows of its layers here."""
        return (self, self.dense)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: QuestMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store a batch's keys and values, and attend.

        Args:
            layer: the vLLM layer, for its name.
            query: `[num_tokens, num_heads, head_size]`, padding at its end.
            key: `[num_tokens, num_kv_heads, head_size]`; stored, but not by layers that share the
                cache of another.
            value: the same.
            kv_cache: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`, see `kv_page`.
            attn_metadata: the batch; None while vLLM measures memory.
            output: `[num_tokens, num_heads, head_size]`, written and returned.
            output_scale: must be None.
            output_block_scale: must be None.

        Raises:
            NotImplementedError: vLLM asked for a quantised output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("QUEST does not quantise its output")
        if attn_metadata is None:
            return output.zero_()
        if self.has_own_cache:
            self._write_kv(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        if self.has_window:
            windowed = attn_metadata.windowed
            self.dense.forward(layer, query, key, value, kv_cache, windowed, output)
            return output
        num_rows, num_tokens = attn_metadata.num_decode_rows, attn_metadata.num_actual_tokens
        if attn_metadata.rows is not None:
            self._decode(layer, query[:num_rows], kv_cache, attn_metadata.rows, output[:num_rows])
        if attn_metadata.prefill is not None:
            tokens = kv_page.block_tokens(kv_cache, self.quest.page_size)
            self.platform.attend_prefill(
                self.dense,
                layer,
                query[num_rows:num_tokens],
                kv_cache[:, :, :tokens],
                attn_metadata.prefill,
                output[num_rows:num_tokens],
            )
        return output

    def _write_kv(
        self, layer: AttentionLayer, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        """Store keys and values, and renew the bounds of the pages they fall into."""
        if self.has_window:
            self.dense.do_kv_cache_update(layer, key, value, kv_cache, slots)
        else:
            page_size, score = self.quest.page_size, self.quest.score
            ops.write_kv(key, value, kv_cache, slots, page_size, score)

    def _decode(
        self,
        layer: AttentionLayer,
        query: Tensor,  # [num_rows, num_heads, head_size]
        kv_cache: Tensor,
        rows: DecodeRows,
        output: Tensor,  # [num_rows, num_heads, head_size]
    ) -> None:
        is_dense = self._is_dense(layer)
        budgets = rows.unlimited if is_dense else rows.budgets
        chooses = rows.any_sparse and not is_dense
        page_size, scale, soft_cap = self.quest.page_size, self.scale, self.soft_cap
        if chooses and rows.in_clusters and self.chooses_itself:
            for part, scores in rows.cluster_passes():
                ops.cluster_decode(
                    query[part],
                    kv_cache,
                    rows.block_table[part],
                    rows.seq_lens[part],
                    budgets[part],
                    page_size,
                    scale,
                    soft_cap,
                    output[part],
                    rows.workspace,
                    rows.counters,
                    scores,
                    follows_write_kv=self.has_own_cache and part.start == 0,
                )
            return
        for part in rows.passes():
            queries, seq_lens = query[part], rows.seq_lens[part]
            scores, pages = rows.scores[: len(seq_lens)], rows.pages[: len(seq_lens)]
            batch = (queries, kv_cache, rows.block_table[part], seq_lens, budgets[part])
            if chooses:
                self.choose_pages(layer, *batch, scores, pages)
            attention = (page_size, scale, soft_cap, output[part], rows.workspace)
            ops.sparse_decode(*batch, pages, *attention, rows.counters)

    def choose_pages(
        self,
        layer: AttentionLayer,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        budgets: Tensor,
        scores: Tensor,
        pages: Tensor,
    ) -> None:
        """Write the pages that each row attends to in a layer; arguments as in `ops`."""
        page_size = self.quest.page_size
        ops.score(query, kv_cache, block_table, seq_lens, budgets, page_size, scores)
        ops.select(scores, seq_lens, budgets, page_size, pages)

    chooses_itself: ClassVar[bool] = True
    """Whether pages are chosen by QUEST, so that `ops.cluster_decode` may do it."""

    @classmethod
    @contextlib.contextmanager
    def choosing(cls, choose_pages: Callable[..., None]) -> Iterator[None]:
        """Have another function in the place of `choose_pages`, in all layers of this process.

        For those who watch the choice or compare it with others; CUDA graphs would not see it.
        """
        own = cls.choose_pages
        cls.choose_pages = choose_pages  # type: ignore[method-assign]
        cls.chooses_itself = False
        try:
            yield
        finally:
            cls.choose_pages = own  # type: ignore[method-assign]
            cls.chooses_itself = True

    def _is_dense(self, layer: Any) -> bool:
        """Whether the layer is one of the first `dense_layers`; its name has its number."""
        if self._is_dense_layer is None:
            number = re.search(r"layers\.(\d+)", layer.layer_name)
            if number is None:
                raise ValueError(
                    f"QUEST cannot tell the number of layer {layer.layer_name!r}; expected a name "
                    f"with 'layers.<number>'; {OTHER_BACKEND}"
                )
            self._is_dense_layer = int(number.group(1)) < self.quest.dense_layers
        return self._is_dense_layer
