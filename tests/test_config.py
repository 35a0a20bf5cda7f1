"""Settings are validated in one place, and every error says which, what and what is allowed."""

from types import SimpleNamespace

import pytest

from vllm_quest.config import QuestConfig


def test_defaults():
    assert QuestConfig.from_settings({}) == QuestConfig(
        token_budget=2048,
        dense_layers=2,
        page_size=16,
        score="minmax",
        keep_first_pages=1,
        keep_newest_percent=0,
    )


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        QuestConfig().token_budget = 1


@pytest.mark.parametrize(
    "settings",
    [{"token_budget": -1}, {"dense_layers": 0}, {"page_size": 8}, {"score": "mid_dev"}],
)
def test_edge_values_are_allowed(settings):
    QuestConfig.from_settings(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_budget": 0}, ["'token_budget'", "0", "positive", "-1"]),
        ({"token_budget": -2}, ["'token_budget'", "-2", "positive"]),
        ({"token_budget": 1e3}, ["'token_budget'", "1000.0", "an integer"]),
        ({"token_budget": "1024"}, ["'token_budget'", "'1024'", "an integer"]),
        ({"token_budget": True}, ["'token_budget'", "True", "an integer"]),
        ({"token_budget": None}, ["'token_budget'", "None", "an integer"]),
        ({"dense_layers": -1}, ["'dense_layers'", "-1", "0 or a positive"]),
        ({"page_size": 12}, ["'page_size'", "12", "multiple of 8"]),
        ({"page_size": 0}, ["'page_size'", "0", "multiple of 8"]),
        ({"score": "mean"}, ["'score'", "'mean'", "minmax, mean_std, mid_dev"]),
        ({"score": 1}, ["'score'", "1", "minmax, mean_std, mid_dev"]),
        ({"score": ["minmax"]}, ["'score'", "['minmax']", "minmax, mean_std, mid_dev"]),
        ({"token_buget": 1}, ["'token_buget'", "'token_budget'", "dense_layers", "page_size"]),
        ({"zzz": 1}, ["'zzz'", "token_budget, dense_layers, page_size, score"]),
        ([1], ["[1]", "mapping"]),
        ("token_budget=1", ["'token_budget=1'", "mapping"]),
    ],
)
def test_an_impossible_setting_is_named_in_one_line(settings, words):
    with pytest.raises(ValueError) as error:
        QuestConfig.from_settings(settings)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (15, 1), (16, 1), (17, 2), (2048, 128)])
def test_a_budget_is_rounded_up_to_whole_pages(tokens, pages):
    assert QuestConfig(page_size=16).pages(tokens) == pages


@pytest.mark.parametrize(
    "key", ["token_budget", "score", "QUEST", "Quest", "qeust", "quest_config", "quest-settings"]
)
def test_settings_beside_their_section_are_refused(key):
    vllm_config = SimpleNamespace(additional_config={key: {"token_budget": 64}})
    with pytest.raises(ValueError) as error:
        QuestConfig.from_vllm(vllm_config)
    assert repr(key) in str(error.value)
    assert '"quest": {"token_budget": 2048}' in str(error.value)


@pytest.mark.parametrize("key", ["request", "sequence_config", "equest", "ascend", 7])
def test_keys_of_others_are_none_of_its_business(key):
    vllm_config = SimpleNamespace(additional_config={key: 1, "quest": {"token_budget": 64}})
    assert QuestConfig.from_vllm(vllm_config).token_budget == 64
