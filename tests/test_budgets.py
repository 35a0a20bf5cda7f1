"""Each request gets the budget that it asked for, and bad ones are refused when they arrive."""

import random

import numpy as np
import pytest

from engines import ON_GPU, engine, greedy, random_prompts, token_ids, write_model, write_weights
from vllm_quest import ops
from vllm_quest.budgets import SERVER_DEFAULT, requested_budget


@pytest.mark.parametrize("value", [0, -2, 1.5, "1024", True, [1024], None, {}])
def test_a_bad_budget_is_named_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"quest_token_budget is .*; allowed: a positive number"):
        requested_budget({"quest_token_budget": value})


@pytest.mark.parametrize("key", ["quest_budget", "quest_tokens", "quest_token_budgets"])
def test_a_misspelt_field_is_refused_with_the_right_name(key):
    with pytest.raises(ValueError, match=f"'{key}'; did you mean 'quest_token_budget'"):
        requested_budget({key: 64})


@pytest.mark.parametrize("extra_args", [None, {}, {"of_another_plugin": 5}])
def test_no_budget_means_the_servers(extra_args):
    assert requested_budget(extra_args) == SERVER_DEFAULT


def test_an_absurd_budget_is_clipped():
    assert requested_budget({"quest_token_budget": 10**30}) == np.iinfo(np.int32).max


def test_budgets_follow_their_requests(tmp_path, monkeypatch):
    """Hundreds of requests through few slots: the pages selected tell whose budget a row had.

    Every request's first prompt token is its own mark, which the test reads back from the row's
    first key through the KV cache: nothing here trusts the host's own table of budgets.
    """
    model = write_weights(write_model(tmp_path))
    rng = random.Random(5)
    choices = [16, 48, 112, 240, -1]
    prompts = random_prompts([rng.choice([20, 130, 300, 600]) for _ in range(200)])
    budgets = [rng.choice(choices) for _ in prompts]
    for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        prompt["prompt_token_ids"][0] = 3 + choices.index(budget)
        prompt["prompt_token_ids"][1] = 10 + index
    params = [
        greedy(rng.randint(2, 20), extra_args={"quest_token_budget": budget}) for budget in budgets
    ]
    seen = []

    def sparse_decode(query, kv_cache, block_table, seq_lens, row_budgets, pages, *rest):
        # Position 0 has no rotation, so the first key of a request depends on its mark alone.
        for table, seq_len, row_budget in zip(block_table, seq_lens, row_budgets, strict=True):
            mark = kv_cache[table[0], :, 0].sum().item()
            seen.append((round(mark, 3), int(seq_len), int(row_budget)))
        compiled(query, kv_cache, block_table, seq_lens, row_budgets, pages, *rest)

    compiled = ops.sparse_decode
    monkeypatch.setattr(ops, "sparse_decode", sparse_decode)
    quest = {"dense_layers": 0, "token_budget": 64}
    options = {"max_num_seqs": 7, "max_num_batched_tokens": 256, "max_model_len": 1024}
    with engine(
        model, quest=quest, num_gpu_blocks_override=160 if ON_GPU else 20, **options
    ) as llm:
        token_ids(llm, prompts, params)

    by_mark: dict[float, set[int]] = {}
    for mark, _, row_budget in seen:
        by_mark.setdefault(mark, set()).add(row_budget)
    pages = {budget // 16 if budget > 0 else ops.UNLIMITED_PAGES for budget in choices}
    layers = 3
    assert len(by_mark) == layers * len(choices)
    for row_budgets in by_mark.values():
        assert len(row_budgets - {ops.UNLIMITED_PAGES}) <= 1
    assert set.union(*by_mark.values()) == pages
