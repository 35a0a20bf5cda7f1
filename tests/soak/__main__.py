"""See `command`."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from soak.command import main  # noqa: E402

sys.exit(main())
