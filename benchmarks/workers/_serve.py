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


def serve(run: Callable[[], object]) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    result = run()
    print(json.dumps({"result": result}), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answers, flush=True)
