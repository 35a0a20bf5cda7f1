"""The bundled model finds its pass keys through QUEST's pages, not through as many recent ones."""

import pytest
import torch

from engines import DENSE, agree, answers, engine, greedy
from vllm_quest import ops, reference
from vllm_quest.pass_keys import make_haystack

CONTEXT_TOKENS = 16384
NUM_QUESTIONS = 16


def recent_pages(scores, rows, pages, *, page_size, **kept):
    """Stand-in for `ops.select`: as many pages, but the newest, whatever they score."""
    limits = zip(rows.seq_lens.tolist(), rows.budget_pages.tolist(), strict=True)
    for row, (seq_len, budget) in enumerate(limits):
        num_pages = -(-seq_len // page_size)
        if num_pages > budget:
            pages[row, :, :budget] = torch.arange(num_pages - budget, num_pages)


@pytest.fixture(scope="module")
def haystack():
    return make_haystack(CONTEXT_TOKENS, 128, seed=7)


@pytest.fixture(scope="module")
def questions(haystack):
    facts = haystack.facts[:: len(haystack.facts) // NUM_QUESTIONS][:NUM_QUESTIONS]
    return [(haystack.prompt(fact), fact.code) for fact in facts]


def share_right(llm, questions) -> float:
    """The share of answers that are right to the last number."""
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in questions]
    answers = llm.chat(chats, greedy(5), use_tqdm=False)
    return sum(
        answer.outputs[0].text.strip() == code
        for answer, (_, code) in zip(answers, questions, strict=True)
    ) / len(questions)


def test_retrieval_at_an_eighth_of_the_context(demo_model, questions, monkeypatch):
    quest = {"token_budget": CONTEXT_TOKENS // 8, "dense_layers": 0}
    with engine(demo_model, quest=quest, kv_cache_memory_bytes=1 << 30) as llm:
        assert share_right(llm, questions) >= 0.9
        monkeypatch.setattr(ops, "select", recent_pages)
        assert share_right(llm, questions) <= 0.3


@pytest.mark.parametrize("score", ["mean_std", "mid_dev"])
def test_other_scores_are_stored_and_retrieve_as_well(demo_model, questions, monkeypatch, score):
    caches, write_kv = [], ops.write_kv

    def spy(key, value, kv_cache, slot_mapping, **settings):
        caches.append((kv_cache, int(slot_mapping[0])))
        write_kv(key, value, kv_cache, slot_mapping, **settings)

    monkeypatch.setattr(ops, "write_kv", spy)
    quest = {"token_budget": CONTEXT_TOKENS // 8, "dense_layers": 0, "score": score}
    with engine(demo_model, quest=quest, kv_cache_memory_bytes=1 << 30) as llm:
        assert share_right(llm, questions[:4]) == 1.0
        cache, first_slot = caches[0]
        block_tokens = reference.tokens_per_block(cache, 16)
        block = cache[first_slot // block_tokens].cpu()
        found = block[:, block_tokens].double()
        right = torch.cat(reference.bounds_of(block[:, :16, :64], score), dim=-1)
        assert (found - right).abs().max() <= 2.0**-7 * right.abs().max()  # two roundings to bf16


def test_a_covering_budget_gives_the_dense_answers(demo_model, questions):
    prompts = [prompt for prompt, _ in questions]
    runs = []
    for options in ({"backend": DENSE}, {"quest": {"token_budget": -1}}):
        with engine(demo_model, kv_cache_memory_bytes=1 << 30, **options) as llm:
            runs.append(answers(llm, prompts, greedy(8)))
    assert agree(*runs)
