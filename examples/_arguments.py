"""What every example takes on its command line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parse(description: str | None, **options: str) -> Namespace:
    """Reads --model and --remote, and further options with their defaults."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--model", default=DEMO_MODEL, help="a served model, a folder, or a hub id")
    parser.add_argument("--remote", action="store_true", help="run on the server")
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()
