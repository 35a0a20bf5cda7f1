"""What can be measured; `ALL` is in the order of the report."""

from benchmarks.accuracy.tasks.base import Request, Sample, Task
from benchmarks.accuracy.tasks.key_value import KeyValue
from benchmarks.accuracy.tasks.longbench import DATASETS, LongBench
from benchmarks.accuracy.tasks.multi_query import MultiQuery
from benchmarks.accuracy.tasks.passkey import PassKey
from benchmarks.accuracy.tasks.perplexity import Perplexity
from benchmarks.accuracy.tasks.variable_tracking import VariableTracking

_TASKS: list[Task] = [
    PassKey(),
    KeyValue(),
    MultiQuery(),
    VariableTracking(),
    Perplexity(),
    *(LongBench(dataset) for dataset in DATASETS),
]
ALL: dict[str, Task] = {task.name: task for task in _TASKS}

__all__ = ["ALL", "Request", "Sample", "Task"]
