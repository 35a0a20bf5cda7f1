"""The stages of QUEST in one layer, in the paper's order: write, score, select, attend."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_quest import kv_page, layout, ops
from vllm_quest.config import QuestConfig
from vllm_quest.decode_plan import DecodePlan
from vllm_quest.layers import is_full_attention
from vllm_quest.metadata import QuestMetadata
from vllm_quest.platforms import this_platform
from vllm_quest.support import FP8_CACHE_DTYPES, OTHER_BACKEND, sink_head_reasons

NOT_USED = {"chunk_lookback": -1}
"""Values beside None by which a model says that a layer does without."""


class Chooser(Protocol):
    """Writes the pages that each row attends to in a layer; see `ops.score` and `ops.select`."""

    def __call__(
        self,
        impl: "QuestImpl",
        layer: AttentionLayer,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        scores: Tensor,
        pages: Tensor,
        /,
    ) -> None: ...


def choose_by_score(
    impl: "QuestImpl",
    layer: AttentionLayer,
    query: Tensor,
    kv_cache: Tensor,
    rows: ops.Rows,
    scores: Tensor,
    pages: Tensor,
) -> None:
    """QUEST's own choice. On GPUs with clusters of CTAs `ops.cluster_decode` makes it."""
    page_size = impl.quest.page_size
    if impl.quest.score == "codes":
        masses = impl.new_masses(query, scores)
        ops.score_codes(
            query,
            kv_cache,
            rows,
            masses,
            scores,
            page_size=page_size,
            scale=impl.scale,
            soft_cap=impl.soft_cap,
        )
    else:
        ops.score(query, kv_cache, rows, scores, page_size=page_size)
    ops.select(scores, rows, pages, page_size=page_size, **impl.quest.kept)


class QuestImpl(AttentionImpl[QuestMetadata]):
    """One attention layer. Prefill is the platform backend's work, and so are layers that see part
    of their context: sliding windows, chunked local attention.

    `supports_quant_query_input` stays False, so that rows are decoded with a query that is not
    rounded to fp8.
    """

    chooser: ClassVar[Chooser] = staticmethod(choose_by_score)
    """Who chooses pages, in all layers of this process; see `choosing`."""

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
        sinks: Tensor | None = None,
        **extras: Any,
    ) -> None:
        """See `vllm/v1/attention/backend.py`.

        Args:
            sinks: `[num_heads]`, the layer's own weights, see `ops.sparse_decode`.
            extras: what some models ask of every backend, for each of their layers
                (`Attention.__init__`), if only to say that a layer does without.

        Raises:
            ValueError: the layer needs what QUEST does not do.
        """
        for name, value in extras.items():
            if value is not None and value != NOT_USED.get(name):
                raise ValueError(
                    f"QUEST cannot serve this model: its attention layers need {name}; "
                    f"{OTHER_BACKEND}"
                )
        if alibi_slopes is not None:
            raise ValueError(f"QUEST cannot serve this model: it uses ALiBi; {OTHER_BACKEND}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.has_fp8_cache = kv_cache_dtype in FP8_CACHE_DTYPES
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.quest = QuestConfig.active()
        self.has_own_cache = kv_sharing_target_layer_name is None
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
            sinks,
        )
        if sinks is not None:
            for reason in sink_head_reasons(num_heads, self.dense):
                raise ValueError(f"QUEST cannot serve this model: {reason}")

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
            layer: the vLLM layer, for its name and the scales of an fp8 cache.
            query: `[num_tokens, num_heads, head_size]`, padding at its end.
            key: `[num_tokens, num_kv_heads, head_size]`; stored, but not by layers that share the
                cache of another.
            value: the same.
            kv_cache: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`, see `kv_page`; an fp8
                cache as uint8.
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
        if not is_full_attention(layer):
            if self.has_own_cache:
                slots = attn_metadata.slot_mapping
                self.dense.do_kv_cache_update(layer, key, value, kv_cache, slots)
            windowed = attn_metadata.windowed
            self.dense.forward(layer, query, key, value, kv_cache, windowed, output)
            return output
        scales = None
        if self.has_fp8_cache:
            # The layer's own tensors: graphs then see what loading weights puts there.
            scales = ops.KvScales(layer._k_scale, layer._v_scale)
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        if self.has_own_cache:
            page_size, score = self.quest.page_size, self.quest.score
            slots = attn_metadata.slot_mapping
            ops.write_kv(
                key, value, kv_cache, slots, page_size=page_size, score=score, scales=scales
            )
        num_rows, num_tokens = attn_metadata.num_decode_rows, attn_metadata.num_actual_tokens
        if attn_metadata.decode is not None:
            is_dense = layer.layer_name in attn_metadata.dense_layers
            plan = attn_metadata.decode
            self._decode(
                layer, query[:num_rows], kv_cache, scales, plan, output[:num_rows], is_dense
            )
        if attn_metadata.prefill is not None:
            tokens = kv_page.block_tokens(kv_cache, self.quest.page_size, self.quest.score)
            self.platform.attend_prefill(
                self.dense,
                layer,
                query[num_rows:num_tokens],
                kv_cache[:, :, :tokens],
                attn_metadata.prefill,
                output[num_rows:num_tokens],
            )
        return output

    def _decode(
        self,
        layer: AttentionLayer,
        query: Tensor,  # [num_rows, num_heads, head_size]
        kv_cache: Tensor,
        scales: ops.KvScales | None,
        plan: DecodePlan,
        output: Tensor,  # [num_rows, num_heads, head_size]
        is_dense: bool,
    ) -> None:
        rows = plan.dense_rows if is_dense else plan.rows
        chooses = plan.any_sparse and not is_dense
        attention: dict[str, Any] = {
            "page_size": self.quest.page_size,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "sinks": self.sinks,
            "workspace": plan.workspace,
            "counters": plan.counters,
            "score": self.quest.score,
            "scales": scales,
        }
        if chooses and plan.in_clusters and QuestImpl.chooser is choose_by_score:
            is_coded = self.quest.score == "codes"
            follows_write_kv = self.has_own_cache and plan.beside_write and not is_coded
            for part, far_keys in plan.cluster_passes(with_scratch=is_coded):
                masses = None
                if is_coded:
                    masses = self.new_masses(query[part], plan.scores)
                    ops.weigh_pages(
                        query[part],
                        kv_cache,
                        rows[part],
                        masses,
                        page_size=self.quest.page_size,
                        scale=self.scale,
                        soft_cap=self.soft_cap,
                    )
                ops.cluster_decode(
                    query[part],
                    kv_cache,
                    rows[part],
                    output[part],
                    far_keys=far_keys,
                    follows_write_kv=follows_write_kv and part.start == 0,
                    masses=masses,
                    **attention,
                    **self.quest.kept,
                )
            return
        for part in plan.passes():
            num_rows = part.stop - part.start
            scores, pages = plan.scores[:num_rows], plan.pages[:num_rows]
            if chooses:
                QuestImpl.chooser(self, layer, query[part], kv_cache, rows[part], scores, pages)
            ops.sparse_decode(query[part], kv_cache, rows[part], pages, output[part], **attention)

    def new_masses(self, query: Tensor, scores: Tensor) -> Tensor:
        """Scratch of `ops.score_codes` and `ops.weigh_pages`, for a query and its scores."""
        columns = layout.mass_columns(scores.shape[2], self.quest.page_size)
        return scores.new_empty(*query.shape[:2], columns)

    @classmethod
    @contextlib.contextmanager
    def choosing(cls, chooser: Chooser) -> Iterator[None]:
        """Have another chooser in all layers of this process.

        For those who watch the choice or compare it with others; CUDA graphs would not see it.
        """
        own, cls.chooser = cls.chooser, chooser
        try:
            yield
        finally:
            cls.chooser = own
