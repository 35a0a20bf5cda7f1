"""See `command`."""

import os
import sys
from pathlib import Path

# Threads wait for one another at every operator, for long where others use the machine as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import conftest  # noqa: E402, F401  (vLLM's environment, as in the tests)
from fuzz.command import main  # noqa: E402

sys.exit(min(main(), 1))
