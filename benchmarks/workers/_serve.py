"""Runs a benchmark's subject once for each line on standard input and answers the seconds it took.

Needs nothing but the standard library: subjects live in virtual environments of their own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def serve(**runs: Callable[[], object]) -> None:
    """Answers what each run gives, by name, then the seconds of those that lines name."""
    answers, sys.stdout = sys.stdout, sys.stderr
    result = {name: run() for name, run in runs.items()}
    print(json.dumps({"result": result}), file=answers, flush=True)
    for line in sys.stdin:
        run = runs[line.strip()]
        started = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answers, flush=True)
