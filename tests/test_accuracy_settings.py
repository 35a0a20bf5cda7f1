"""Settings of QUEST given with the harness's engine arguments.

In a file of its own: an engine that ends takes the process groups of its process with it, and
test_accuracy.py keeps one engine for all of its tests.
"""

from benchmarks.accuracy.interface import Prompt
from benchmarks.accuracy.tokens import Tokens
from benchmarks.accuracy.vllm_engine import VllmEngine
from vllm_quest.pass_keys import make_haystack


def test_settings_of_quest_reach_the_engine(demo_model):
    tokens = Tokens(demo_model)
    haystack = make_haystack(512, 4, seed=5)
    prompts = [
        Prompt(*tokens.split(haystack.text, f" {fact.question}"), 6) for fact in haystack.facts
    ]
    options = {"additional_config": {"quest": {"page_size": 8}}}
    with VllmEngine(demo_model, dense_layers=0, max_model_len=1024, options=options) as pages_of_8:
        config = pages_of_8._llm.llm_engine.vllm_config.additional_config["quest"]
        answers = pages_of_8.run(prompts, "quest", [1024] * len(prompts))
    assert config == {"page_size": 8, "dense_layers": 0, "token_budget": -1}
    texts = [tokens.text(answer.tokens).strip() for answer in answers]
    assert texts == [fact.code for fact in haystack.facts]
