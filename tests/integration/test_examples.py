"""The examples run on the demo model, in process, and show what they say.

Their experiments of the literature are in test_experiments.py, which checks the numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.mark.usefixtures("demo_folder")
def test_the_logit_lens_ends_in_paris(tmp_path: Path) -> None:
    lines = _run("logit_lens", cwd=tmp_path).splitlines()
    assert len(lines) == 31
    assert lines[-1].endswith("' Paris'")


@pytest.mark.usefixtures("demo_folder")
def test_steering_moves_the_answer_with_its_strength(tmp_path: Path) -> None:
    lines = _run("steering", cwd=tmp_path).splitlines()[1:]
    margins = [float(line.split()[5]) for line in lines]
    assert len(margins) == 5
    assert margins == sorted(margins)


@pytest.mark.usefixtures("demo_folder")
def test_features_are_shown_for_every_token(tmp_path: Path) -> None:
    lines = _run("sae_features", cwd=tmp_path).splitlines()
    assert lines[0].startswith("trained on ")
    assert len(lines) > 6
    assert all(line.count(":") >= 3 for line in lines[1:])


@pytest.mark.usefixtures("demo_folder")
def test_a_patch_across_models_brings_the_answer_over(tmp_path: Path) -> None:
    model, other, patched = _run("cross_model_patching", cwd=tmp_path).splitlines()
    assert model.endswith("' Paris'")
    assert patched.endswith("' Paris'")
    assert not other.endswith("' Paris'")


@pytest.mark.usefixtures("demo_folder")
def test_a_text_is_steered_while_it_is_generated(tmp_path: Path) -> None:
    lines = _run("generation_steering", "--tokens", "5", cwd=tmp_path).splitlines()
    projections = [float(line.partition("mean projection ")[2].split()[0]) for line in lines]
    assert len(projections) == 3
    assert projections == sorted(projections)
    assert len({line.partition("projection")[2] for line in lines}) == 3


@pytest.mark.usefixtures("demo_folder")
def test_a_probe_that_is_trained_in_a_session_knows_what_it_has_not_seen(tmp_path: Path) -> None:
    loss, good, bad, _ = _run("probe", cwd=tmp_path).splitlines()
    first, last = (float(loss.split()[place]) for place in (1, 6))
    assert last < first / 2
    assert int(good.split("%")[0]) > int(bad.split("%")[0])


@pytest.mark.usefixtures("demo_folder")
def test_a_lora_that_is_trained_in_a_session_teaches_a_fact(tmp_path: Path) -> None:
    before, after, _ = _run("lora", cwd=tmp_path).splitlines()
    assert before.endswith("' Paris'")
    assert after.endswith("' Rome'")
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapter) == 16
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
