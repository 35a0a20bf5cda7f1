"""`python -m tests.soak`: a server under mixed load, its memory over time, its metrics, its kill.

Fails if a request is lost, if `/metrics` and the clients disagree, if memory grows, or if the
server does not come back after `kill -9`.
"""

import argparse
import json
import random
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine

from .load import MODEL, VOCABULARY, Tally, client, run_clients
from .server import KV_HEADS, LAYERS, Server, gpu_mib

SAMPLE_SECONDS = 2.0
GROWTH_ALLOWED = 0.03
"""Of the memory: the median of the last third of the samples over that of the second."""

LOOK_SECONDS = 6.0
"""After which `/metrics` has what the last step counted (`monitor.LOOK_EVERY_S`, and some)."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("soak.json"))
    parser.add_argument("--plot", type=Path, help="draw the memory over time there")
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="the server's output")
    parser.add_argument("options", nargs="*", help="more options of vllm serve, behind --")
    return parser.parse_args(arguments)


def soak(server: Server, told: argparse.Namespace, tally: Tally) -> list[dict[str, float]]:
    """Load the server for the time told; returns samples of its memory."""
    begun = time.monotonic()
    deadline = begun + told.minutes * 60

    def is_over() -> bool:
        return time.monotonic() > deadline or not server.is_up()

    threads = run_clients(server.url, told.clients, told.seed, is_over, tally)
    samples = []
    while any(thread.is_alive() for thread in threads):
        if not server.is_up():
            raise RuntimeError(f"the server ended; {told.log} may say why")
        sample = {"seconds": time.monotonic() - begun, "rss_mib": server.rss_mib()}
        if (gpu := gpu_mib({process.pid for process in server.family()})) is not None:
            sample["gpu_mib"] = gpu
        samples.append(sample)
        time.sleep(SAMPLE_SECONDS)
    return [sample for sample in samples if sample["seconds"] < told.minutes * 60]


def growth(samples: list[dict[str, float]], key: str) -> float:
    """How much larger memory is in the last third than in the second, as a share."""
    third = len(samples) // 3
    values = torch.tensor([sample[key] for sample in samples])
    earlier, later = values[third : 2 * third].median(), values[2 * third :].median()
    return float(later / earlier - 1)


def compare_under_load(metrics: dict[str, float], tally: Tally) -> list[str]:
    """What `/metrics` says of all requests against what clients counted."""
    # vLLM counts a request that its client left only where it had ended before.
    reasons = ("stop", "length")
    ended = sum(metrics.get(f"vllm:request_success_total {reason}", 0.0) for reason in reasons)
    wrong = []
    if not tally.finished <= ended <= tally.finished + tally.cut:
        wrong.append(f"{ended:.0f} ended; clients: {tally.finished} to the end, {tally.cut} cut")
    prompt = metrics["vllm:prompt_tokens_total"]
    if prompt != tally.prompt_tokens:
        wrong.append(f"{prompt:.0f} prompt tokens; clients sent {tally.prompt_tokens}")
    generated = metrics["vllm:generation_tokens_total"]
    if not tally.generated <= generated <= tally.generated + tally.asked:
        wrong.append(f"{generated:.0f} tokens; clients have {tally.generated} of whole answers")
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if metrics[gauge] != 0:
            wrong.append(f"{gauge} is {metrics[gauge]} at the end")
    return wrong


def compare_exactly(server: Server, seed: int) -> list[str]:
    """A few requests at once, none of them cut: every counter is known beforehand."""
    rng = random.Random(f"exact {seed}")
    time.sleep(LOOK_SECONDS)
    before = server.metrics()
    requests = [
        {
            "prompt": [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 1500))],
            "max_tokens": rng.randint(1, 30),
        }
        for _ in range(12)
    ]
    to = client(server.url)

    def ask(request: dict[str, Any]) -> None:
        to.completions.create(model=MODEL, extra_body={"ignore_eos": True}, **request)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, requests))
    time.sleep(LOOK_SECONDS)
    after = server.metrics()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    decoded = sum(request["max_tokens"] - 1 for request in requests)
    rows = grown["vllm:quest_sparse_rows_total"] + grown["vllm:quest_dense_rows_total"]
    expected = {
        "vllm:request_success_total length": len(requests),
        "vllm:prompt_tokens_total": sum(len(request["prompt"]) for request in requests),
        "vllm:generation_tokens_total": sum(request["max_tokens"] for request in requests),
    }
    wrong = [
        f"{name} grew by {grown[name]:.0f}, not {value}"
        for name, value in expected.items()
        if grown[name] != value
    ]
    # A prompt whose last token comes alone adds one row.
    least = decoded * LAYERS * KV_HEADS
    most = (decoded + len(requests)) * LAYERS * KV_HEADS
    if not least <= rows <= most:
        wrong.append(f"QUEST counted {rows:.0f} rows; {least} to {most} are possible")
    return wrong


def check_kill(server: Server, told: argparse.Namespace) -> dict[str, Any]:
    """`kill -9` under load, and the same command again."""
    tally, is_over = Tally(), [False]
    threads = run_clients(server.url, told.clients, told.seed + 1, lambda: is_over[0], tally)
    time.sleep(5)
    left = server.kill()
    is_over[0] = True
    for thread in threads:
        thread.join()
    started = server.start()
    answer = client(server.url).completions.create(model=MODEL, prompt=[5] * 700, max_tokens=5)
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    time.sleep(LOOK_SECONDS)
    metrics = server.metrics()
    assert metrics["vllm:prompt_tokens_total"] == 700
    assert metrics["vllm:quest_sparse_rows_total"] <= 5 * LAYERS * KV_HEADS
    assert len(server.metrics_folders()) == 1
    return {"left_behind": left, "started_again_in_s": round(started, 1)}


def plot(samples: list[dict[str, float]], path: Path, title: str) -> None:
    """Memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    minutes = [sample["seconds"] / 60 for sample in samples]
    names = {"rss_mib": "server, resident", "gpu_mib": "GPU"}
    for key, name in names.items():
        if key in samples[0]:
            axis.plot(minutes, [sample[key] / 1024 for sample in samples], label=name)
    axis.set(xlabel="time (minutes)", ylabel="memory (GiB)", title=title)
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if anything was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    told = parse(arguments)
    tally, wrong = Tally(), []
    with told.log.open("wb") as log:
        server = Server(log, told.options)
        try:
            start_s = server.start()
            samples = soak(server, told, tally)
            time.sleep(LOOK_SECONDS)
            wrong += compare_under_load(server.metrics(), tally)
            wrong += compare_exactly(server, told.seed)
            killed = check_kill(server, told)
        finally:
            server.stop()
    grown = {key: growth(samples, key) for key in samples[0] if key != "seconds"}
    wrong += [
        f"{key} grew by {share:.1%}" for key, share in grown.items() if share > GROWTH_ALLOWED
    ]
    wrong += [f"lost: {what}" for what in tally.lost[:10]]
    counts = {name: value for name, value in vars(tally).items() if isinstance(value, int)}
    result = {
        "command": shlex.join(["python", "-m", "tests.soak", *arguments]),
        "machine": machine(),
        "minutes": told.minutes,
        "clients": told.clients,
        **counts,
        "lost": len(tally.lost),
        "start_s": round(start_s, 1),
        "growth": grown,
        "kill": killed,
        "wrong": wrong,
        "samples": samples,
    }
    told.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    if told.plot is not None:
        total = tally.finished + tally.cut + tally.refused
        plot(samples, told.plot, f"{total} requests, {len(tally.lost)} lost")
    return int(bool(wrong))
