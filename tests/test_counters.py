"""What decode steps read is counted exactly, and shown: by `stats`, in the log, as metrics."""

import os
import time
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

import vllm_quest
from batch import Shape, make_batch
from engines import ON_GPU, engine, greedy, random_prompts, token_ids, write_model, write_weights
from vllm_quest import layout, monitor, ops, reference
from vllm_quest.counters import Counts, QuestStats, total

LAYERS, KV_HEADS, PAGE = 3, 2, 16
QUEST = {"token_budget": 64, "dense_layers": 1}
LENGTHS = [5, 60, 64, 65, 129, 400]
BUDGETS = [None, None, 16, 16, 1024, -1]


def counts_of(operators, batch, counters) -> list[int]:
    batch.run(operators)
    batch.sparse_decode(operators, counters=counters)
    return counters.tolist()


@pytest.mark.parametrize("operators", [ops, reference], ids=["compiled", "reference"])
def test_the_operator_counts_rows_and_pages(operators):
    """Lengths 0 (padding), within the budget, and beyond it; two KV heads each."""
    batch = make_batch(Shape(), [0, 1, 160, 161, 1500], [1, 1, 10, 10, ops.UNLIMITED_PAGES])
    counters = torch.tensor([100, 200, 300, 400, 500])
    full = 1 + 10 + 11 + 94
    expected = [100 + 2, 200 + 2 * 3, 300 + 2 * 11, 400 + 2 * (full - 1), 500 + 2 * full]
    assert counts_of(operators, batch, counters) == expected


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        (torch.zeros(5, dtype=torch.int32), "dtype: counters must be Long"),
        (torch.zeros(4, dtype=torch.int64), r"shape: counters must be \[5\]"),
        (torch.zeros(10, dtype=torch.int64)[::2], "layout: counters must be contiguous"),
    ],
)
def test_the_operator_says_what_is_wrong_with_counters(counters, message):
    with pytest.raises(RuntimeError, match=f"vllm_quest::sparse_decode: {message}"):
        counts_of(ops, make_batch(Shape(), [100], 2), counters)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


def requests(num_tokens: int):
    prompts = random_prompts(LENGTHS)
    params = [
        greedy(num_tokens, extra_args=None if budget is None else {"quest_token_budget": budget})
        for budget in BUDGETS
    ]
    return prompts, params


def slow_count(num_tokens: int, full_layers: int = LAYERS, kv_heads: int = KV_HEADS) -> Counts:
    """Count row by row what the requests should read. The prefill makes the first token."""
    counts = []
    for length, own in zip(LENGTHS, BUDGETS, strict=True):
        budget = QUEST["token_budget"] if own is None else own
        steps = range(length + 1, length + num_tokens)
        for seq_len, layer, _ in product(steps, range(full_layers), range(kv_heads)):
            pages = -(-seq_len // PAGE)
            is_sparse = (
                layer >= QUEST["dense_layers"] and budget != -1 and pages > -(-budget // PAGE)
            )
            if is_sparse:
                counts.append(Counts(1, 0, pages, -(-budget // PAGE), pages))
            else:
                counts.append(Counts(0, 1, 0, pages, pages))
    return total(counts)


CUDA_GRAPHS = pytest.param(
    False,
    id="CUDA graphs",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")],
)


@pytest.mark.parametrize("process", ["this process", "vLLM's default"])
@pytest.mark.parametrize("enforce_eager", [pytest.param(True, id="eager"), CUDA_GRAPHS])
def test_stats_are_exact(model, enforce_eager, process, monkeypatch):
    """Also where users run engines: in a process of their own."""
    if process == "vLLM's default":
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    prompts, params = requests(8)
    with engine(model, quest=QUEST, enforce_eager=enforce_eager) as llm:
        before = vllm_quest.stats(llm)
        token_ids(llm, prompts, params)
        after = vllm_quest.stats(llm)
    counted = Counts(*(b - a for a, b in zip(before.values(), after.values(), strict=True)))
    assert counted == slow_count(8)


def test_an_engines_monitor_is_found_again(model):
    """vLLM calls `__post_init__` again while an engine starts in a process of its own."""
    arguments = EngineArgs(model, attention_backend="QUEST", skip_tokenizer_init=True)
    vllm_config = arguments.create_engine_config()
    made = monitor.Monitor.of(vllm_config, torch.device("cpu"))
    vllm_config.__post_init__()
    assert monitor.Monitor.existing(vllm_config) is made


@pytest.mark.skipif(ON_GPU, reason="needs two devices, which CPU workers always find")
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_stats_add_up_workers_in_other_processes(tmp_path, monkeypatch, kv_heads):
    """Two ranks with a KV head each, or with the same one, which then counts once."""
    model = write_weights(write_model(tmp_path, num_key_value_heads=kv_heads))
    first, *_, last = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{last}")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts, params = requests(8)
    with engine(model, quest=QUEST, tensor_parallel_size=2) as llm:
        before = metrics(llm)  # of this process's other engines
        token_ids(llm, prompts, params)
        stats = vllm_quest.stats(llm)
        assert stats == QuestStats.of(slow_count(8, kv_heads=kv_heads), PAGE)
        time.sleep(2 * monitor.LOOK_EVERY_S)
        assert [b - a for a, b in zip(before, metrics(llm), strict=True)] == stats.values()


def test_windowed_layers_do_not_count(tmp_path):
    windows = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "full_attention"],
    }
    prompts, params = requests(4)
    with engine(write_weights(write_model(tmp_path, **windows)), quest=QUEST) as llm:
        token_ids(llm, prompts, params)
        assert vllm_quest.stats(llm) == QuestStats.of(slow_count(4, full_layers=2), PAGE)


def test_shares():
    stats = QuestStats(sparse_rows=3, dense_rows=1, pages_scored=80, pages_read=25, pages_full=100)
    assert stats.share_of_rows_sparse == 0.75
    assert stats.share_of_pages_read == 0.25
    assert stats.share_of_kv_bytes_read == 0.25 + 0.8 / 16
    assert QuestStats().share_of_kv_bytes_read == 0


@pytest.mark.parametrize("page_size", [8, 16, 128])
@pytest.mark.parametrize("score", ["minmax", "mean_std", "codes"])
def test_bytes_of_scoring_are_the_rows_that_a_block_has_for_it(score, page_size):
    """All pages of a block scored, and none read."""
    tokens = 256
    pages = tokens // page_size
    stats = QuestStats(pages_scored=pages, pages_full=pages, page_size=page_size, score=score)
    rows = layout.block_rows(tokens, page_size, score) - tokens
    assert stats.share_of_kv_bytes_read == rows / tokens


class OtherExtension:
    def other_method(self) -> None:
        pass


def test_stats_of_an_engine_that_cannot_tell(model):
    with (
        engine(model, backend=None) as llm,
        pytest.raises(ValueError, match="does not use QUEST: give LLM attention_backend='QUEST'"),
    ):
        vllm_quest.stats(llm)
    extension = f"{__name__}.OtherExtension"
    with (
        engine(model, worker_extension_cls=extension) as llm,
        pytest.raises(ValueError, match=r"OtherExtension: let it inherit vllm_quest\.monitor\."),
    ):
        vllm_quest.stats(llm)


def metrics(llm) -> list[int]:
    """The engine's counters as `LLM.get_metrics` has them."""
    return [
        sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:quest_{name}")
        for name in vars(Counts())
    ]


def test_log_and_metrics_follow_and_fall_silent(model, monkeypatch):
    monkeypatch.setattr(monitor, "envs", SimpleNamespace(VLLM_LOG_STATS_INTERVAL=0.3))
    monkeypatch.setattr(monitor, "LOOK_EVERY_S", 0.1)
    lines = []
    monkeypatch.setattr(
        monitor.logger, "info", lambda line, *values, **_: lines.append(line % values)
    )
    prompts, params = requests(8)
    with engine(model, quest=QUEST) as llm:
        before = metrics(llm)
        token_ids(llm, prompts, params)
        time.sleep(1)
        lines_after_requests = len(lines)
        time.sleep(1)
        stats, after = vllm_quest.stats(llm), metrics(llm)
    if not ON_GPU:  # there the last two steps are seen with the next
        assert [b - a for a, b in zip(before, after, strict=True)] == stats.values()
    assert any(line.startswith("QUEST rows sparse: ") for line in lines)
    assert len(lines) == lines_after_requests
