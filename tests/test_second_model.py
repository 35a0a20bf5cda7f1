"""What the second model's training rests on: windows, files of weights, facts hidden in sources."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_quest.pass_keys import FACT_TOKENS, hide_in_text

TRAINING = Path(__file__).parents[1] / "training"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of `training/`, which are scripts beside each other."""
    monkeypatch.syspath_prepend(TRAINING)
    import checkpoint
    import llama
    import train_second

    return SimpleNamespace(checkpoint=checkpoint, llama=llama, train=train_second)


def count_words(text: str) -> int:
    return len(text.split())


SOURCE = "\n".join(f"line {number} of the source" for number in range(50))


def test_facts_are_hidden_between_the_lines_of_a_text() -> None:
    haystack = hide_in_text(SOURCE, 120, 3, seed=1, count_tokens=count_words)
    assert haystack.num_tokens == count_words(haystack.text)
    assert 120 - 5 < haystack.num_tokens <= 120
    lines = haystack.text.splitlines()
    facts = [f"# {fact.sentence}" for fact in haystack.facts]
    assert set(facts) < set(lines)
    source = [line for line in lines if line not in facts]
    first = SOURCE.splitlines().index(source[0])
    assert source == (SOURCE.splitlines() * 2)[first : first + len(source)]
    assert haystack == hide_in_text(SOURCE, 120, 3, seed=1, count_tokens=count_words)
    assert haystack != hide_in_text(SOURCE, 120, 3, seed=2, count_tokens=count_words)


@pytest.mark.parametrize(("text", "num_tokens"), [(SOURCE, 2 * FACT_TOKENS), (" \n", 500)])
def test_a_text_in_which_nothing_can_be_hidden_is_refused(text: str, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="3 facts in"):
        hide_in_text(text, num_tokens, 3, seed=1, count_tokens=count_words)


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 100])
def test_windowed_layers_see_the_window_and_the_others_everything(
    demo: SimpleNamespace, num_tokens: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, num_tokens, 16)
    key, value = torch.randn(2, 2, 2, num_tokens, 16)
    places = torch.arange(num_tokens)
    distance = places[:, None] - places
    for layer, reach in ((0, demo.train.WINDOW), (1, demo.train.WINDOW), (2, num_tokens)):
        out = demo.train.windowed_attention(layer, query, key, value)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(2, dim=1),
            value.repeat_interleave(2, dim=1),
            attn_mask=(distance >= 0) & (distance < reach),
        )
        torch.testing.assert_close(out, expected)


def test_weights_in_several_files_are_read_back(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.checkpoint, "MAX_FILE_BYTES", 60_000)
    words = demo.checkpoint.tokenizer()
    shape = demo.llama.Shape(
        vocabulary=words.get_vocab_size(), hidden=32, feed_forward=64, layers=3, heads=2, kv_heads=1
    )
    model = demo.llama.Llama(shape)
    model.initialize(torch.Generator().manual_seed(0))
    demo.checkpoint.write(model, tmp_path, words)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    demo.checkpoint.check(tmp_path)  # against transformers
