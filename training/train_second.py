"""Train the second model: a deeper Llama that reads Python sources and recalls pass keys from them.

    python training/source_tokenizer.py tokenizer.json
    python training/train_second.py --tokenizer tokenizer.json --out second_model --minutes 5
    python training/evaluate.py second_model --fillers words sources --dense-layers 2 0

Its first two layers see a short window while the recall is learned, so that it is learned in the
layers behind them; in the last stage they see everything in half of the steps. What is written is
a plain Llama, whose recall lies in layers that QUEST makes sparse with two dense layers, too.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import checkpoint
import sources
from haystacks import Batch
from llama import Attend, Attention, FeedForward, Llama, RMSNorm, Shape, causal_attention
from source_haystacks import SourceHaystacks
from train import Stage, Trainer, follow

SHAPE = Shape(vocabulary=8192, hidden=384, feed_forward=1024, layers=10, heads=8, kv_heads=2)
CURRICULUM = (
    Stage(256, copies=1.0, pass_accuracy=0.9),
    Stage(256, copies=0.33),
    Stage(512),
    Stage(1024),
    Stage(2048),
    Stage(4096, rate=0.7, tokens_per_step=2**17),
    Stage(8192, rate=0.7, tokens_per_step=2**17),
    Stage(16_384, rate=0.5, tokens_per_step=2**17),
    Stage(33_024, shorter=0.6, rate=0.5, tokens_per_step=2**17, pass_accuracy=2.0),
)
PEAK_RATE = 1.5e-3
WINDOWED_LAYERS = 2
WINDOW = 32
TEXT_WEIGHT = 0.5
"""Of the loss on text tokens, beside that on answers."""
MAX_SOURCE_BYTES = 80_000_000
PERPLEXITY_LENGTH = 8192


def windowed_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, in the first layers to the last `WINDOW` tokens only."""
    if layer >= WINDOWED_LAYERS:
        return causal_attention(layer, query, key, value)
    num_tokens = query.shape[2]
    group_size = query.shape[1] // key.shape[1]
    padding = (0, 0, 0, -num_tokens % WINDOW)
    query = F.pad(query, padding).unflatten(2, (-1, WINDOW))  # [rows, heads, chunks, WINDOW, d]
    key, value = (
        F.pad(x.repeat_interleave(group_size, dim=1), padding).unflatten(2, (-1, WINDOW))
        for x in (key, value)
    )
    key, value = (  # a chunk and the one before it
        torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), dim=3) for x in (key, value)
    )
    distance = WINDOW + torch.arange(WINDOW)[:, None] - torch.arange(2 * WINDOW)
    allowed = ((distance >= 0) & (distance < WINDOW)).to(query.device)
    mask = allowed.expand(query.shape[2], -1, -1).clone()
    mask[0, :, :WINDOW] = False
    rows, chunks = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    mask = mask.repeat(rows, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = out.unflatten(0, (rows, chunks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :num_tokens]


class SecondTrainer(Trainer):
    """Answers and source text, first under windows, then also without them."""

    curriculum = CURRICULUM
    peak_rate = PEAK_RATE

    def __init__(self, *, tokenizer: Tokenizer, shape: Shape, **options: object) -> None:
        self.tokenizer = tokenizer
        self.shape = shape
        device = torch.device(options["device"])
        training = sources.encode(tokenizer, sources.training_files(0), MAX_SOURCE_BYTES)
        held_out = sources.encode(tokenizer, sources.held_out_files(), MAX_SOURCE_BYTES)
        print(f"{len(training)} tokens of sources, {len(held_out)} held out", flush=True)
        self.streams = [training.to(device), held_out.to(device)]  # the second for validation
        super().__init__(**options)

    def haystacks(self, seed: int) -> SourceHaystacks:
        return SourceHaystacks(self.tokenizer, self.streams.pop(0), self.device, seed)

    def new_model(self) -> Llama:
        model = Llama(self.shape)
        if self.device.type == "cuda":
            compile_pointwise(model)
        return model

    def write(self) -> None:
        checkpoint.write(self.model, self.folder, self.tokenizer)

    @property
    def is_last_stage(self) -> bool:
        return self.progress.stage == len(self.curriculum) - 1

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss on answers and text, accuracy of the answers."""
        see_all = self.is_last_stage and self.rng.random() < 0.5
        return self.measure(batch, causal_attention if see_all else windowed_attention)

    def measure(self, batch: Batch, attend: Attend) -> tuple[Tensor, Tensor]:
        wanted = (
            batch.answers if batch.texts is None else torch.cat([batch.answers, batch.texts], 1)
        )
        targets = batch.tokens.gather(1, wanted)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch.tokens, attend, wanted=wanted - 1)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(targets)
        num_answers = batch.answers.shape[1]
        loss = losses[:, :num_answers].mean()
        if batch.texts is not None:
            loss = loss + TEXT_WEIGHT * losses[:, num_answers:].mean()
        hits = logits[:, :num_answers].argmax(-1) == targets[:, :num_answers]
        return loss, hits.float().mean()

    @torch.no_grad()
    def keep_best(self) -> float:
        """Measure on texts kept aside; write the weights.

        The last stage's learning rate falls to nothing, so later is better.
        """
        means = {}
        for name, attend in {"windowed": windowed_attention, "all": causal_attention}.items():
            found = [self.measure(batch, attend)[1].item() for batch in self.validation]
            means[name] = sum(found) / len(found)
            print(name, [round(accuracy, 4) for accuracy in found], flush=True)
        self.write()
        return means["all"]


def compile_pointwise(model: Llama) -> None:
    """Fuse what lies between matrix products; lengths vary."""
    for module in model.modules():
        if isinstance(module, RMSNorm | FeedForward):
            module.compile(dynamic=True)
        elif isinstance(module, Attention):
            module.project = torch.compile(module.project, dynamic=True)


@torch.inference_mode()
def perplexity(model: Llama, tokenizer: Tokenizer, attend: Attend) -> float:
    """Of the held-out sources, read with attention to everything, `PERPLEXITY_LENGTH` at a time."""
    device = model.lm_head.weight.device
    stream = sources.encode(tokenizer, sources.held_out_files(), MAX_SOURCE_BYTES).long()
    losses = []
    for chunk in stream.split(PERPLEXITY_LENGTH):
        if len(chunk) == PERPLEXITY_LENGTH:
            logits = model(chunk[None].to(device), attend)[0, :-1]
            losses.append(F.cross_entropy(logits.float(), chunk[1:].to(device)).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for training")
    parser.add_argument("--max-length", type=int, default=CURRICULUM[-1].length)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--hidden", type=int, default=SHAPE.hidden)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log", type=Path, help="file for one JSON record per step")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    trainer = SecondTrainer(
        tokenizer=tokenizer,
        shape=Shape(
            vocabulary=SHAPE.vocabulary,
            hidden=args.hidden,
            feed_forward=args.hidden * SHAPE.feed_forward // SHAPE.hidden,
            layers=args.layers,
            heads=SHAPE.heads,
            kv_heads=SHAPE.kv_heads,
        ),
        folder=args.out,
        device=torch.device(args.device),
        seconds=args.minutes * 60,
        max_length=args.max_length,
        seed=args.seed,
    )
    follow(trainer, args.log)

    dtype = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
    model = checkpoint.read(args.out, trainer.device, dtype)
    for name, attend in {"windowed": windowed_attention, "all": causal_attention}.items():
        print(f"perplexity, {name}: {perplexity(model, tokenizer, attend):.3f}", flush=True)
    checkpoint.check(args.out)


if __name__ == "__main__":
    main()
