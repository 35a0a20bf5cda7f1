"""Train the demo model: a small Llama that recalls pass keys from a text of 32K tokens.

    python training/train.py --out vllm_quest/demo_model --minutes 7

Only answers are trained on. The texts grow from 128 tokens to 38K: the next length comes when the
model answers right at the present one. Seven minutes on an H100; hours on a CPU.
"""

import argparse
import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import evaluate
from haystacks import Batch, Haystacks
from llama import Llama, Shape
from vllm_quest import pass_keys

LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
MAX_FACTS = 256
MAX_QUESTIONS = 128
PATIENCE = 0.2
"""Share of the time after which a stage is left for the next."""
PATIENCE_STEPS = 1500
"""Steps within which copying is learned; without it, training begins anew with other weights."""


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum."""

    length: int  # tokens of the longest text
    copies: float = 0.0  # share of steps that copy instead of asking
    shorter: float = 0.2  # share of steps on the lengths before
    rate: float = 1.0  # factor of the learning rate
    tokens_per_step: int = 2**16  # on a GPU
    pass_accuracy: float = 0.95


CURRICULUM = (
    Stage(128, copies=1.0, pass_accuracy=0.9),
    Stage(256, copies=0.33),
    Stage(512),
    Stage(1024),
    Stage(2048),
    Stage(4096, rate=0.5, tokens_per_step=2**17),
    Stage(8192, rate=0.5, tokens_per_step=2**17),
    Stage(16_384, rate=0.25, tokens_per_step=2**17),
    Stage(32_768, rate=0.25, tokens_per_step=2**18, pass_accuracy=0.98),
    Stage(38_912, shorter=0.7, rate=0.25, tokens_per_step=2**18, pass_accuracy=2.0),
)
CPU_SHARE = 1 / 16
"""A CPU takes this share of a GPU's tokens per step."""

VALIDATION_LENGTHS = (4096, 16_384, 32_768)
EVALUATION_LENGTHS = (4096, 16_384, 32_768)


@dataclass
class Progress:
    """Where training stands."""

    stage: int = 0
    steps: int = 0
    stage_steps: int = 0
    stage_started_s: float = 0.0
    accuracy: float = 0.0  # running mean, of the stage's own length

    def enter(self, stage: int, now_s: float) -> None:
        self.stage, self.stage_steps, self.stage_started_s, self.accuracy = stage, 0, now_s, 0.0


class Trainer:
    """Trains one model within a time budget and keeps its best weights in a folder."""

    curriculum = CURRICULUM
    peak_rate = LEARNING_RATE

    def __init__(
        self, *, folder: Path, device: torch.device, seconds: float, max_length: int, seed: int
    ) -> None:
        self.folder = folder
        self.device = device
        self.seconds = seconds
        self.curriculum = tuple(stage for stage in self.curriculum if stage.length <= max_length)
        self.seed = seed
        self.best_accuracy = -1.0
        self.rng = random.Random(seed)
        self.data = self.haystacks(seed)
        validation = self.haystacks(seed + 1_000_000)
        lengths = [length for length in VALIDATION_LENGTHS if length <= max_length]
        self.validation = [
            validation.questions(2, length, length // 64, min(length // 64, MAX_QUESTIONS))
            for length in (lengths or [max_length])
        ]
        self.restart(0.0)

    def haystacks(self, seed: int) -> Haystacks:
        return Haystacks(self.device, seed)

    def new_model(self) -> Llama:
        return Llama(Shape(vocabulary=len(pass_keys.vocabulary())))

    def write(self) -> None:
        checkpoint.write(self.model, self.folder)

    def restart(self, now_s: float) -> None:
        """Begin with new weights."""
        self.progress = Progress(stage_started_s=now_s)
        self.model = self.new_model()
        self.model.initialize(torch.Generator().manual_seed(self.seed))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.peak_rate,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )

    def run(self) -> Iterator[dict[str, float]]:
        """Train until the time is over; yields a record per step."""
        start = time.monotonic()
        next_validation_s = 0.0
        while (now_s := time.monotonic() - start) < self.seconds:
            record = self.step(now_s)
            if now_s >= next_validation_s:
                record["validation_accuracy"] = self.keep_best()
                next_validation_s = now_s + self.seconds / 20
            yield record
            self.advance(now_s)
        self.keep_best()

    def step(self, now_s: float) -> dict[str, float]:
        """One step of the optimizer."""
        stage = self.curriculum[self.progress.stage]
        rate = self.learning_rate(now_s)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        length, batch = self.draw(stage)
        loss, accuracy = self.answer(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.progress.steps += 1
        self.progress.stage_steps += 1
        record = {"loss": loss.item(), "accuracy": accuracy.item()}
        if length == stage.length:
            self.progress.accuracy += 0.1 * (record["accuracy"] - self.progress.accuracy)
        return record | {"length": length, "rate": rate, "seconds": now_s} | asdict(self.progress)

    def learning_rate(self, now_s: float) -> float:
        """Warm up; fall with the stages; in the last one, fall to nothing as the time ends."""
        rate = self.peak_rate * self.curriculum[self.progress.stage].rate
        rate *= min(1.0, (self.progress.steps + 1) / WARMUP_STEPS)
        if self.progress.stage == len(self.curriculum) - 1:
            left_s = self.seconds - self.progress.stage_started_s
            rate *= (self.seconds - now_s) / left_s
        return rate

    def draw(self, stage: Stage) -> tuple[int, Batch]:
        """A batch of the stage's length, or now and then of a shorter one."""
        length = stage.length
        if self.progress.stage > 1 and self.rng.random() < stage.shorter:
            length = self.rng.choice(self.curriculum[1 : self.progress.stage]).length
        share = 1.0 if self.device.type == "cuda" else CPU_SHARE
        rows = max(1, int(stage.tokens_per_step * share) // length)
        if self.rng.random() < stage.copies:
            return length, self.data.copies(rows, length)
        most = min(MAX_FACTS, length // 32)
        num_facts = round(most * 8 ** -self.rng.random())
        return length, self.data.questions(rows, length, num_facts, min(num_facts, MAX_QUESTIONS))

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on the answer tokens."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch.tokens, wanted=batch.answers - 1)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        return loss, (logits.argmax(-1) == batch.targets).float().mean()

    @torch.no_grad()
    def keep_best(self) -> float:
        """Measure on texts kept aside; write the weights if none were better."""
        accuracies = [self.answer(batch)[1].item() for batch in self.validation]
        accuracy = sum(accuracies) / len(accuracies)
        if accuracy >= self.best_accuracy:
            self.best_accuracy = accuracy
            self.write()
        return accuracy

    def advance(self, now_s: float) -> None:
        """Enter the next stage when this one is passed; give up one that takes too long."""
        progress = self.progress
        stage = self.curriculum[progress.stage]
        passed = progress.accuracy >= stage.pass_accuracy
        too_long = now_s - progress.stage_started_s > PATIENCE * self.seconds
        if progress.stage == 0 and not passed:
            if progress.stage_steps >= PATIENCE_STEPS:
                self.seed += 1
                self.restart(now_s)
        elif progress.stage < len(self.curriculum) - 1 and (passed or too_long):
            progress.enter(progress.stage + 1, now_s)


def follow(trainer: Trainer, log_file: Path | None) -> None:
    """Train to the end, with a progress bar and a JSON record per step in a file."""
    with (
        contextlib.nullcontext() if log_file is None else log_file.open("w") as log,
        tqdm(total=round(trainer.seconds), unit="s", mininterval=5) as bar,
    ):
        for record in trainer.run():
            if log:
                log.write(json.dumps(record) + "\n")
            if record["stage_steps"] == 1 or "validation_accuracy" in record:
                bar.write(json.dumps(record))
            bar.set_description(
                f"step {record['steps']:.0f}, {record['length']:.0f} tokens, "
                f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.1%}",
                refresh=False,
            )
            bar.update(round(record["seconds"]) - bar.n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("vllm_quest/demo_model"))
    parser.add_argument("--minutes", type=float, default=7.0, help="time for training")
    parser.add_argument("--max-length", type=int, default=CURRICULUM[-1].length)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log", type=Path, help="file for one JSON record per step")
    args = parser.parse_args()

    trainer = Trainer(
        folder=args.out,
        device=torch.device(args.device),
        seconds=args.minutes * 60,
        max_length=args.max_length,
        seed=args.seed,
    )
    follow(trainer, args.log)
    checkpoint.check(args.out)
    lengths = [length for length in EVALUATION_LENGTHS if length <= args.max_length]
    evaluate.run(args.out, lengths or [args.max_length], trainer.device)


if __name__ == "__main__":
    main()
