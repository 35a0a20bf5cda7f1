"""KV blocks that leave the cache for host memory come back with their bounds.

On GPUs by vLLM's own copies, also under CUDA graphs; on CPUs, where vLLM has none, by copies of
`host_offloading`.
"""

from dataclasses import replace

import pytest

import host_offloading
from checked_bounds import check_bounds
from engines import (
    ON_GPU,
    agree,
    answers,
    counter,
    engine,
    greedy,
    random_prompts,
    write_model,
    write_weights,
)
from vllm_quest import connectors
from vllm_quest.impl import QuestImpl, choose_by_score

SPARSE = {"token_budget": 128, "dense_layers": 0}
TINY_CACHE = {"num_gpu_blocks_override": 16, "max_model_len": 1024}
"""2048 tokens, in blocks of 128: two prompts of `LENGTHS` leave no room for a third."""

AMPLE_CACHE = {"num_gpu_blocks_override": 64, "max_model_len": 1024}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
LENGTHS = [700, 641, 640, 900]
HITS = "vllm:external_prefix_cache_hits"


def offloading(name: str, **settings) -> dict:
    return {
        "kv_transfer_config": {
            "kv_connector": name,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28} | settings,
        }
    }


ON_HOST = {"spec_name": "HostOffloadingSpec", "spec_module_path": "host_offloading"}
CONNECTORS = (
    {
        "OffloadingConnector": offloading("OffloadingConnector"),
        "SimpleCPUOffloadConnector": offloading("SimpleCPUOffloadConnector"),
        "--kv-offloading-size": {"kv_offloading_size": 0.25},
        "in a MultiConnector": {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "connectors": [offloading("OffloadingConnector")["kv_transfer_config"]]
                },
            }
        },
    }
    if ON_GPU
    else {"OffloadingConnector": offloading("OffloadingConnector", **ON_HOST)}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def host_spec_is_allowed(monkeypatch):
    monkeypatch.setitem(connectors.OFFLOADING_SPECS, "HostOffloadingSpec", ("cpu",))


def one_by_one(llm, prompts):
    """Each prompt by itself, so that it is prefilled in the same parts every time."""
    return [answers(llm, [prompt], greedy(20))[0] for prompt in prompts]


def options_of(chunk_tokens: int) -> dict:
    return {"quest": SPARSE, "max_num_batched_tokens": chunk_tokens}


def stay(model, chunk_tokens):
    """Answers where blocks stay in the cache.

    Asked once, and again, when all but a prompt's end is read from the cache: what is computed of
    a prompt then is what is computed of it where its blocks come back from the host. Computed in
    other parts it is rounded otherwise, and sparse steps may choose other pages.
    """
    prompts, options = random_prompts(LENGTHS), AMPLE_CACHE | options_of(chunk_tokens)
    with engine(model, **options, enable_prefix_caching=True) as llm:
        return [one_by_one(llm, prompts) for _ in range(2)]


@pytest.fixture(scope="module", params=[1024, 256], ids="chunks of {}".format)
def chunk_tokens(request):
    return request.param


@pytest.fixture(scope="module")
def stayed(model, chunk_tokens):
    """As `stay`, with steps that choose as checked ones do: on GPUs not in clusters, whose rounding
    is another."""
    with QuestImpl.choosing(lambda *step: choose_by_score(*step)):
        return stay(model, chunk_tokens)


def comes_back(llm, expected):
    """Ask twice: the first time fills host memory, the second takes from it."""
    prompts = random_prompts(LENGTHS)
    assert agree(expected[0], one_by_one(llm, prompts))
    assert counter(llm, HITS) == 0
    assert agree(expected[1], one_by_one(llm, prompts))
    # Each prompt's full blocks, but one that ends in a full block computes its last anew.
    assert counter(llm, HITS) >= sum((length - 1) // 128 * 128 for length in LENGTHS) / 2


@pytest.mark.parametrize("connector", CONNECTORS)
def test_blocks_come_back_with_their_bounds(model, chunk_tokens, stayed, connector):
    """Prompts that end in a full block, one token behind it, and within it; in chunks or whole."""
    options = TINY_CACHE | options_of(chunk_tokens) | CONNECTORS[connector]
    with engine(model, **options) as llm, check_bounds() as checked:
        comes_back(llm, stayed)
        assert checked.pages > 2 * sum(LENGTHS) / 16


@pytest.mark.skipif(not ON_GPU, reason="CPUs have no CUDA graphs")
def test_blocks_come_back_under_cuda_graphs(model, chunk_tokens):
    options = TINY_CACHE | options_of(chunk_tokens) | CONNECTORS["OffloadingConnector"]
    expected = stay(model, chunk_tokens)
    with engine(model, enforce_eager=False, compilation_config=GRAPHS, **options) as llm:
        comes_back(llm, expected)


def test_bounds_that_were_lost_are_noticed(model, monkeypatch):
    """Or the test above would show nothing. A block's last row is bounds, of its last head."""

    def without_the_last_row(self, kv_caches, num_chunks):
        real(self, kv_caches, num_chunks)
        row_bytes = 2 * 64 * 4  # [2 * head_size] fp32
        for refs in self.refs_of_group:
            refs[:] = [
                replace(ref, page_size_bytes=ref.page_size_bytes - row_bytes) for ref in refs
            ]

    if ON_GPU:
        pytest.skip("vLLM's own copies cannot be made to lose bounds")
    real = host_offloading.HostWorker.__init__
    monkeypatch.setattr(host_offloading.HostWorker, "__init__", without_the_last_row)
    lost = offloading("OffloadingConnector", **ON_HOST)
    prompts = random_prompts([700, 900, 900])
    with engine(model, **TINY_CACHE, quest=SPARSE, **lost) as llm, check_bounds():
        one_by_one(llm, prompts)
        with pytest.raises(AssertionError, match="has not the bounds of its keys"):
            one_by_one(llm, prompts[:1])
