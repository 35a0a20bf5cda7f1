"""H2O, TOVA and QUEST over transformers: budgets are kept, covering ones lose nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from benchmarks.accuracy.interface import Prompt, num_tokens
from benchmarks.accuracy.layer_caches import (
    FullCache,
    H2OCache,
    QuestCache,
    ReadText,
    TovaCache,
    read_densely,
    received_attention,
)
from benchmarks.accuracy.transformers_methods import METHODS, TransformersEngine
from engines import VOCABULARY, engine, token_ids, write_model, write_weights
from vllm_quest.config import QuestConfig
from vllm_quest.pass_keys import make_haystack

HEADS, KV_HEADS, HEAD_SIZE, TEXT = 6, 2, 16, 75
SCALE = HEAD_SIZE**-0.5


def ignore(_: int) -> None:
    pass


@pytest.fixture
def text() -> ReadText:
    return read(seed=0)


def read(seed: int) -> ReadText:
    torch.manual_seed(seed)
    query = torch.randn(HEADS, TEXT, HEAD_SIZE)
    key, value = torch.randn(2, KV_HEADS, TEXT, HEAD_SIZE)
    return read_densely(query, key, value, SCALE, sum_received=True)[0]


def steps(count: int, rows: int = 3) -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    shapes = [(rows, heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [tuple(torch.randn(shape) for shape in shapes) for _ in range(count)]


def test_received_attention_is_the_column_sum_whatever_the_chunks(monkeypatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(KV_HEADS, 3, TEXT, HEAD_SIZE), torch.randn(KV_HEADS, TEXT, HEAD_SIZE)
    later = torch.ones(TEXT, TEXT, dtype=torch.bool).triu(1)
    logits = (torch.einsum("hgqd,hkd->hgqk", query, key) * SCALE).masked_fill(later, -torch.inf)
    expected = logits.softmax(-1).sum(dim=(1, 2))
    for elements in (1, 6 * TEXT * 7, 2**24):
        monkeypatch.setattr("benchmarks.accuracy.layer_caches.MAX_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(received_attention(query, key, SCALE), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda text, budget: H2OCache([text] * 3, budget),
        lambda text, budget: TovaCache([text] * 3, budget),
        lambda text, budget: QuestCache(text, 3, budget, 9, QuestConfig()),
    ],
    ids=["h2o", "tova", "quest"],
)
def test_a_covering_budget_is_full_attention(text: ReadText, make) -> None:
    cache, full = make(text, TEXT + 9), FullCache([text] * 3)
    for query, key, value in steps(9):
        found, expected = (c.attend(query, key, value, SCALE) for c in (cache, full))
        torch.testing.assert_close(found, expected)
    short, full = make(text, 32), FullCache([text] * 3)
    query, key, value = steps(1)[0]
    assert not torch.allclose(
        short.attend(query, key, value, SCALE), full.attend(query, key, value, SCALE)
    )


@pytest.mark.parametrize("kind", [H2OCache, TovaCache])
@pytest.mark.parametrize("budget", [1, 2, 7, 32])
def test_a_step_attends_to_exactly_the_budget(text: ReadText, kind, budget: int) -> None:
    cache = kind([text] * 3, budget)
    for query, key, value in steps(5):
        cache.attend(query, key, value, SCALE)
        assert cache.num_kept == budget


@pytest.mark.parametrize("method", ["h2o", "tova"])
def test_tokens_are_dropped_as_the_papers_say(text: ReadText, method: str) -> None:
    """Against sets of positions, one per KV head, and a loop per step."""
    budget, row = 11, 1
    cache = {"h2o": H2OCache, "tova": TovaCache}[method]([text] * 3, budget)
    keys, values = list(text.key.unbind(1)), list(text.value.unbind(1))  # of [kv_heads, d] each
    kept = [set(range(TEXT)) for _ in range(KV_HEADS)]
    received = [dict(enumerate(of_head.tolist())) for of_head in text.received]
    newest_saw = [dict(enumerate(text.last_weights.tolist()))] * KV_HEADS
    for query, key, value in steps(14):
        position = len(keys)
        keys.append(key[row])
        values.append(value[row])
        weights, expected = [], []
        for head in range(KV_HEADS):
            while len(kept[head]) >= budget:
                if method == "h2o":
                    recent = range(position - (budget - budget // 2 - 1), position)
                    found = {p: received[head][p] for p in kept[head] if p not in recent}
                else:
                    found = {p: newest_saw[head][p] for p in kept[head]}
                kept[head].remove(min(found, key=found.__getitem__))
            kept[head].add(position)
            order = sorted(kept[head])
            of_group = query[row].view(KV_HEADS, -1, HEAD_SIZE)[head]
            logits = of_group @ torch.stack([keys[p][head] for p in order]).T * SCALE
            weights.append(logits.softmax(-1))  # [group, kept]
            expected.append(weights[-1] @ torch.stack([values[p][head] for p in order]))
            for p, weight in zip(order, weights[-1].sum(0).tolist(), strict=True):
                received[head][p] = received[head].get(p, 0.0) + weight
        if method == "tova":
            mean = torch.cat(weights).mean(0).tolist()
            newest_saw = [dict(zip(order, mean, strict=True))] * KV_HEADS
        out = cache.attend(query, key, value, SCALE)[row]
        torch.testing.assert_close(out, torch.cat(expected))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_weights(write_model(tmp_path_factory.mktemp("tiny")))


def prompts(material_tokens: int, question_tokens: int, count: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(2)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())

    material = draw(material_tokens)
    return [Prompt(material, draw(question_tokens), 6) for _ in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_a_covering_budget_gives_transformers_own_answers(tiny_model: str, method: str) -> None:
    asked = prompts(150, 4, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    done: list[int] = []
    with TransformersEngine(tiny_model, dense_layers=1, max_model_len=512, device="cpu") as run:
        found = run.run(asked, method, [200, 160, -1], done.append)
    assert sum(done) == num_tokens(asked)
    for prompt, answer in zip(asked, found, strict=True):
        tokens = torch.tensor([prompt.material + prompt.question])
        logits = model(tokens).logits[0, len(prompt.material) - 1 : -1].log_softmax(-1)
        logprobs = logits.gather(1, torch.tensor(prompt.question)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(answer.question_logprobs), logprobs, rtol=1e-4, atol=1e-4
        )
        most_probable = logits.argmax(-1) == torch.tensor(prompt.question)
        assert answer.question_hits == tuple(most_probable.tolist())
        whole = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, tokens.shape[1] :
        ].tolist()
        assert list(answer.tokens) == [token for token in whole if token != 2]


@pytest.mark.parametrize("max_bytes", [1, 2**33], ids=["one text at a time", "all texts"])
def test_rows_of_a_batch_do_not_mix(tiny_model: str, monkeypatch, max_bytes: int) -> None:
    """Questions about one text and about several, of several lengths; budgets take turns."""
    monkeypatch.setattr("benchmarks.accuracy.transformers_methods.MAX_MATERIAL_BYTES", max_bytes)
    asked = [*prompts(150, 4, 2), *prompts(149, 4, 2), *prompts(40, 4, 1)]
    budgets = [48, 32, 32, 48, 48]
    with TransformersEngine(tiny_model, dense_layers=1, max_model_len=512, device="cpu") as run:
        for method in METHODS:
            together = run.run(asked, method, budgets, ignore)
            alone = [
                run.run([prompt], method, [budget], ignore)[0]
                for prompt, budget in zip(asked, budgets, strict=True)
            ]
            assert [a.tokens for a in together] == [a.tokens for a in alone]
            for one, other in zip(together, alone, strict=True):
                assert one.question_logprobs == pytest.approx(other.question_logprobs, abs=1e-4)


def test_an_unknown_method_or_a_long_prompt_is_refused(tiny_model: str) -> None:
    with TransformersEngine(tiny_model, dense_layers=0, max_model_len=20, device="cpu") as run:
        with pytest.raises(ValueError, match="method is 'h3o'; expected one of h2o, tova"):
            run.run([], "h3o", [], ignore)
        with pytest.raises(ValueError, match="has 25 tokens; max_model_len is 20"):
            run.run(prompts(15, 4, 1), "h2o", [-1], ignore)


def test_windows_are_refused(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "m", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=8
    )
    write_weights(folder)
    with (
        TransformersEngine(folder, dense_layers=0, max_model_len=512, device="cpu") as run,
        pytest.raises(NotImplementedError, match="sliding windows"),
    ):
        run.run(prompts(15, 4, 1), "h2o", [-1], ignore)


@pytest.mark.parametrize("kept", [{}, {"keep_first_pages": 0}, {"keep_newest_percent": 50}])
def test_quest_agrees_with_vllm(demo_model: str, kept: dict[str, int]) -> None:
    """vLLM's decode steps begin with the answer's first token: so does the question here."""
    haystack = make_haystack(2048, 32, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    asked = [haystack.prompt(fact) for fact in haystack.facts[:5]]
    budget = 64  # a budget that loses some answers
    quest = {"token_budget": budget, "dense_layers": 0, **kept}
    with engine(demo_model, quest=quest, dtype="float32") as llm:
        in_vllm = token_ids(llm, asked, SamplingParams(temperature=0, max_tokens=5))
    in_vllm = [
        tuple(token for token in answer if token != tokenizer.eos_token_id) for answer in in_vllm
    ]
    given = [
        Prompt(tuple(tokenizer(text).input_ids), answer[:1], 4)
        for text, answer in zip(asked, in_vllm, strict=True)
    ]
    settings = {"dense_layers": 0, "max_model_len": 4096, "device": "cpu"}
    options = {"additional_config": {"quest": kept}}
    with TransformersEngine(demo_model, options=options, **settings) as run:
        found = run.run(given, "quest-hf", [budget] * len(given), ignore)
    assert [p.question + a.tokens for p, a in zip(given, found, strict=True)] == in_vllm
    right = [
        tokenizer.decode(tokens) == fact.code
        for tokens, fact in zip(in_vllm, haystack.facts, strict=False)
    ]
    assert not all(right)
