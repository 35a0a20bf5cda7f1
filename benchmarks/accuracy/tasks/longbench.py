"""The six LongBench datasets of QUEST's paper, with lm-eval's prompts and metrics.

The data come from a folder of `<dataset>.jsonl` files (LongBench's own `data.zip`) or from the hub
that lm-eval names. The document is read densely; what the prompt says after it is fed token by
token. Documents that are too long lose their middle, as in LongBench.
"""

import functools
import importlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks.base import Request, Sample, Unit

# The paper's figure 7, in its order; each with the metric that LongBench gives it.
DATASETS = {
    "qasper": "qa_f1_score",
    "hotpotqa": "qa_f1_score",
    "gov_report": "rouge_score",
    "triviaqa": "qa_f1_score",
    "narrativeqa": "qa_f1_score",
    "multifieldqa_en": "qa_f1_score",
}
FIRST_LINE_ONLY = ("triviaqa",)
"""Few-shot prompts, after whose answer models go on with a next question."""


class LongBench:
    unit: Unit = "share right"

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.name = f"longbench_{dataset}"
        self.title = f"LongBench {dataset} ({DATASETS[dataset].removesuffix('_score')})"

    def refusal(self, request: Request) -> str | None:
        if request.language == "demo":
            return "the model does not read English"
        for module in ("lm_eval", "rouge", "jieba", "fuzzywuzzy"):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install 'vllm-quest[eval]'"
        try:
            _documents(self.dataset, request.data_folder)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:120]
            return f"no data ({type(error).__name__}: {reason}); give a folder with --longbench DIR"
        return None

    def samples(self, request: Request) -> list[Sample]:
        documents = _documents(self.dataset, request.data_folder)
        order = list(range(len(documents)))
        random.Random(0).shuffle(order)
        chosen = order[request.first_sample : request.first_sample + request.num_samples]
        return [self._sample(request, documents[number]) for number in chosen]

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        metric = getattr(_metrics(), DATASETS[self.dataset])
        if self.dataset in FIRST_LINE_ONLY:
            text = text.lstrip("\n").partition("\n")[0]
        return max(float(metric(text.strip(), target)) for target in sample.targets)

    def _sample(self, request: Request, document: dict[str, Any]) -> Sample:
        task = _task(self.dataset)
        before, _, after = str(task["doc_to_text"]).partition("{{context}}")
        question = after.replace("{{question}}", document["question"])
        max_answer_tokens = int(task["generation_kwargs"]["max_gen_toks"])
        room = request.context_tokens - max_answer_tokens - request.tokens.count(question)
        material = before + document["context"]
        ids = request.tokens.ids(material)
        if len(ids) > room:
            half = room // 2
            kept = request.tokens.text(ids[:half]) + request.tokens.text(ids[-half:])
            material = kept
        return Sample(
            Prompt(*request.tokens.split(material, question), max_answer_tokens),
            tuple(document["answers"]),
        )


def _metrics() -> Any:
    return importlib.import_module("lm_eval.tasks.longbench.metrics")


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files; functions that they name stay names."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@functools.cache
def _task(dataset: str) -> dict[str, Any]:
    """lm-eval's description of the dataset."""
    folder = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent / "longbench"
    config: dict[str, Any] = yaml.load((folder / f"{dataset}.yaml").read_text(), Loader=_Loader)
    return config


@functools.cache
def _documents(dataset: str, folder: Path | None) -> list[dict[str, Any]]:
    if folder is not None:
        with (folder / f"{dataset}.jsonl").open() as lines:
            rows = [json.loads(line) for line in lines]
    else:
        datasets = importlib.import_module("datasets")
        task = _task(dataset)
        rows = list(datasets.load_dataset(task["dataset_path"], dataset, split="test"))
    return [
        {
            "context": row["context"],
            "question": row.get("input", row.get("question", "")),
            "answers": row["answers"],
        }
        for row in rows
    ]
