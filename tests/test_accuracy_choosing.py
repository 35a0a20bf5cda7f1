"""benchmarks/choosing: steps that run at once are steps that run one by one; scores are bounds."""

import json
import math

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.choosing import scores
from benchmarks.choosing.attention import Model
from benchmarks.choosing.measure import FLOOR, FULL, Outcome
from benchmarks.choosing.methods import BASELINE, METHODS
from benchmarks.choosing.report import Store, rows, write
from benchmarks.choosing.rows import BLOCK_TOKENS, make_rows
from benchmarks.choosing.selection import Keep, chosen_pages

TEXT, STEPS, VOCABULARY = 300, 24, 64
"""The steps cross a page and a block of 128 tokens: 300 to 324."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Random weights, large enough that attention is peaked."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**SIZES, num_hidden_layers=3, initializer_range=0.4)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Model(str(folder), dense_layers=1, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Layers with a sliding window, and full ones."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=2,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        initializer_range=0.2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return Model(str(folder), dense_layers=0, device="cpu", dtype="float32")


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (TEXT + STEPS,), generator=generator)


def random_rows(length=200, steps=8):
    """The last steps of a text of `length` tokens, and two streams of it."""
    torch.manual_seed(2)
    return make_rows(
        torch.randn(2, 4, steps, 16), torch.randn(2, 2, length, 16), 0.25, length - steps
    )


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_full_attention_in_steps_is_the_models_own(name, tokens, request) -> None:
    model = request.getfixturevalue(name)
    text = model.read(tokens[:TEXT].tolist())
    found = model.decode(text, tokens[None, TEXT:], None, 0).logits[0]
    own = model._model.__class__.from_pretrained(
        model._model.config._name_or_path, attn_implementation="eager"
    )
    with torch.inference_mode():
        expected = own(tokens[None]).logits[0, TEXT:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    again = model.read_logits(tokens.tolist(), last=STEPS)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_covering_budget_is_full_attention(llama, tokens, method) -> None:
    text = llama.read(tokens[:TEXT].tolist())
    full = llama.decode(text, tokens[None, TEXT:], None, 0).logits
    if method.held is None:
        covering = llama.decode(text, tokens[None, TEXT:], method, 512).logits
        torch.testing.assert_close(covering, full)
    if method.name != "oracle mass, p8 +25":  # on random weights it may choose all that counts
        assert not torch.allclose(llama.decode(text, tokens[None, TEXT:], method, 160).logits, full)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_steps_at_once_are_steps_one_by_one(llama, tokens, method) -> None:
    """A step does not see what comes later, nor do its scores."""
    text = llama.read(tokens[:TEXT].tolist())
    together = llama.decode(text, tokens[None, TEXT:], method, 160).logits
    shorter = llama.decode(text, tokens[None, TEXT : TEXT + 9], method, 160).logits
    torch.testing.assert_close(shorter, together[:, :9], atol=1e-4, rtol=1e-4)
    other = torch.cat((tokens[TEXT : TEXT + 9], tokens[: STEPS - 9]))
    streams = llama.decode(text, torch.stack((other, tokens[TEXT:])), method, 160).logits
    torch.testing.assert_close(streams[0, :9], together[0, :9], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(streams[1], together[0], atol=1e-4, rtol=1e-4)


def test_minmax_bounds_every_product_and_four_bits_are_wider() -> None:
    rows = random_rows()
    largest = scores.true_maximum(rows, 8)
    exact, rounded = scores.minmax(rows, 8), scores.minmax_4_bits(rows, 8)
    full = slice(0, BLOCK_TOKENS // 8)
    assert (exact[..., full] >= largest[..., full] - 1e-5).all()
    assert (rounded[..., full] >= exact[..., full] - 1e-5).all()
    low, high = scores.bounds_4_bits(rows.key, 8)
    pages = rows.key.unflatten(2, (-1, 8))
    assert (low <= pages.amin(3) + 1e-6).all() and (high >= pages.amax(3) - 1e-6).all()
    assert (rounded[..., full] - exact[..., full]).max() < 0.5 * exact.max()


def test_more_bits_are_nearer_and_levels_are_the_best_for_gaussian_keys() -> None:
    torch.manual_seed(3)
    key = 3 + 2 * torch.randn(1, 1, 64 * BLOCK_TOKENS, 16)

    def error(bits, levels="gaussian"):
        return ((scores.coded_keys(key, bits, levels) - key) / 2).square().mean().item()

    # Max 1960: mean square errors of 2, 4 and 16 levels, and of evenly spaced ones.
    assert error(1) == pytest.approx(0.3634, rel=0.03)
    assert error(2) == pytest.approx(0.1175, rel=0.03)
    assert error(2, "even") == pytest.approx(0.1188, rel=0.03)
    assert error(4) == pytest.approx(0.0095, rel=0.1)
    assert error(4, "even") == pytest.approx(0.0115, rel=0.1)


def test_mass_is_the_share_of_the_softmax() -> None:
    rows = random_rows()
    weights = rows.logits.softmax(-1)
    expected = weights.unflatten(-1, (-1, 16)).sum(-1).amax(2)
    torch.testing.assert_close(scores.true_mass(rows, 16).exp(), expected)
    assert rows.logits[..., -1].isinf().all()  # padding


def test_what_is_kept_is_within_the_budget() -> None:
    rows = random_rows(length=400)
    best = torch.zeros(2, 2, 8, 32)
    best[..., 5] = 9
    keep = Keep(first_page=True, newest_share=1 / 4, unfinished_block=True)
    pages = chosen_pages(best, rows, page_tokens=16, token_budget=256, keep=keep)
    assert (pages.sum(-1) == 16).all()
    newest = (rows.lengths - 1) // 16
    for step, page in enumerate(newest.tolist()):
        chosen = pages[0, 0, step]
        assert chosen[0] and chosen[5] and chosen[page - 3 : page + 1].all()
        assert not chosen[page + 1 :].any()
        unfinished = int(rows.lengths[step]) // BLOCK_TOKENS * BLOCK_TOKENS // 16
        assert chosen[unfinished : page + 1].all()
    with pytest.raises(ValueError, match="kept before any is chosen"):
        chosen_pages(best, rows, page_tokens=16, token_budget=16, keep=keep)
    nothing = chosen_pages(best, rows, page_tokens=16, token_budget=16, keep=Keep())
    assert nothing.sum() == nothing.gather(-1, newest.expand(2, 2, -1)[..., None]).sum()


def test_pages_are_chosen_until_a_share_is_held() -> None:
    """The fewest pages of those that rank highest; and those kept, which count."""
    rows = make_rows(torch.randn(1, 1, 1, 16), torch.randn(1, 1, 128, 16), 0.25, 127)
    shares = torch.tensor([0.05, 0.4, 0.01, 0.3, 0.02, 0.17, 0.02, 0.03])
    chosen = {}
    for held in (0.03, 0.5, 0.9, 1.0):
        for token_budget in (64, 128):
            pages = chosen_pages(
                shares.log().expand(1, 1, 1, 8),
                rows,
                page_tokens=16,
                token_budget=token_budget,
                keep=Keep(first_page=True),
                held=held,
            )
            chosen[held, token_budget] = pages.flatten().nonzero().flatten().tolist()
    assert chosen[0.03, 128] == [0, 7]
    assert chosen[0.5, 128] == [0, 1, 3, 7]
    assert chosen[0.9, 128] == [0, 1, 3, 5, 7]
    assert chosen[0.9, 64] == [0, 1, 3, 7]
    assert chosen[1.0, 128] == list(range(8))


def test_the_true_mass_holds_the_most_attention() -> None:
    """With one query head, whose mass is the ranking itself."""
    torch.manual_seed(4)
    rows = make_rows(torch.randn(1, 1, 4, 16) * 3, torch.randn(1, 1, 512, 16), 0.25, 508)
    held = {}
    for method in METHODS:
        pages = chosen_pages(
            method.score(rows, method.page_tokens),
            rows,
            page_tokens=method.page_tokens,
            token_budget=256,
            keep=Keep(),
        )
        attended = pages.repeat_interleave(method.page_tokens, -1)[:, :, None]
        held[method.name] = (rows.logits.softmax(-1) * attended).sum(-1).mean().item()
    of_pages_of_16 = {name: mass for name, mass in held.items() if "p16" in name}
    assert max(of_pages_of_16, key=held.__getitem__).startswith("oracle mass")
    assert held["keys 4 bits, mass, p16 +25"] > held["keys 1 bit, mass, p16 +25"]


def test_a_report_is_made_of_the_windows_that_are_finished(tmp_path) -> None:
    settings = {"context": 64, "steps": 4, "questions": 2, "dense_layers": 0}
    store = Store(tmp_path / "windows.jsonl", settings)
    half = METHODS[1].name
    for window in range(2):
        store.add(
            window,
            [
                Outcome(FLOOR, 0, [1, 1, 1, 1], [1.0] * 4, []),
                Outcome(FULL, 0, [1, 1, 1, 1], [math.log(2)] * 4, [1, 1]),
                Outcome(BASELINE.name, 256, [1, 0, 0, 0], [1.0] * 4, [0, 0]),
                Outcome(half, 256, [1, 1, 0, 0], [1.0] * 4, [1, 0]),
            ],
        )
    with (tmp_path / "windows.jsonl").open("a") as file:
        file.write('{"settings": "a line that a run was stopped in')
    again = Store(tmp_path / "windows.jsonl", settings)
    assert again.windows == store.windows
    assert not Store(tmp_path / "windows.jsonl", {}).windows
    write(tmp_path, store=again, command="a command", machine="a machine", settings=settings)
    report = (tmp_path / "report.md").read_text()
    assert "Full attention's perplexity is 2.000" in report
    found = {
        row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    }
    assert found[half]["agreement"]["mean"] == 0.5
    assert found[half]["agreement_difference"]["mean"] == 0.25
    assert found[half]["facts_difference"]["mean"] == 0.5
    assert found[BASELINE.name]["agreement_difference"] is None
    assert len(rows(list(again.windows.values()))) == 4
