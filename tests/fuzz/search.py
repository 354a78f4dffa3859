"""Fuzzes what decodes and checks sessions for as long as it is let: `python tests/fuzz/search.py`.

With atheris (`pip install atheris`), guided by coverage; without it, at random. The corpus is made
from the valid sessions of the tests and kept in the folder that is given. What is found is a file
there whose bytes crash this again: give it as an argument to see where.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_TESTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "insitu-fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--unguided", action="store_true", help="change messages, not bytes")
    parser.add_argument("inputs", nargs="*", type=Path, help="files to try, instead of searching")
    options = parser.parse_args()
    # What is guided has to be imported after atheris has begun to watch.
    atheris = None
    is_guided = not options.unguided and not options.inputs
    if is_guided and importlib.util.find_spec("atheris"):
        import atheris
    target = _target(atheris)
    if options.inputs:
        for path in options.inputs:
            target.try_bytes(path.read_bytes())
        return
    target.write_corpus(options.corpus)
    if atheris is None:
        _at_random(target, options.corpus, options.seconds)
        return
    flags = [sys.argv[0], str(options.corpus), f"-max_total_time={int(options.seconds)}"]
    atheris.Setup([*flags, "-max_len=65536", "-rss_limit_mb=4096"], target.try_bytes)
    atheris.Fuzz()


def _target(atheris: Any) -> Any:
    if atheris is None:
        return _make()
    # Coverage of these alone: torch's would drown it.
    with atheris.instrument_imports(include=["insitu_scheduler", "insitu_shard", "insitu_wire"]):
        return _make()


def _make() -> Any:
    import insitu
    from insitu_proto.v1.session_pb2 import Session
    from insitu_scheduler.models import KnownModel
    from insitu_shard.engine import load_model
    from support.fuzz_seeds import seed_sessions
    from support.fuzzing import run_in_engine
    from support.tiny_models import TinyModels

    folder = Path(tempfile.mkdtemp())
    llama = TinyModels(folder).folder("llama")
    model = load_model("tiny", llama)
    known = {"tiny": KnownModel.from_description(model.describe(), ())}
    seeds = seed_sessions(insitu.LanguageModel(str(llama)), folder)

    class Target:
        def try_bytes(self, data: bytes) -> None:
            try:
                session = Session.FromString(data)
            except Exception:
                return  # the gate refuses it
            run_in_engine(session, model, known)

        def write_corpus(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for number, seed in enumerate(seeds):
                (folder / f"seed-{number}").write_bytes(seed.SerializeToString())

        def changed(self, source: random.Random) -> bytes:
            from support.fuzzing import garbled, mutated

            message = mutated(source.choice(seeds), source).SerializeToString()
            return garbled(message, source) if source.random() < 0.3 else message

    return Target()


def _at_random(target: Any, folder: Path, seconds: float) -> None:
    number, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = target.changed(random.Random(number))
        try:
            target.try_bytes(data)
        except Exception:
            (folder / f"crash-{number}").write_bytes(data)
            print(f"crash-{number} in {folder}", file=sys.stderr)
            raise
        number += 1
    print(f"{number} sessions, none of them crashed anything")


if __name__ == "__main__":
    main()
