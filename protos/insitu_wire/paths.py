"""Where insitu keeps files between runs, for whichever of its programs looks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Gives insitu's cache folder: INSITU_CACHE_DIR, else below the user's cache folder."""
    if folder := os.environ.get("INSITU_CACHE_DIR"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "insitu"


def state_folder() -> Path:
    """Gives the folder for a server's journal and results: INSITU_DATA_DIR, else the user's own."""
    if folder := os.environ.get("INSITU_DATA_DIR"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "insitu"


def model_cache_folder(name: str) -> Path:
    """Gives the folder in which a model of this name is cached."""
    return cache_folder() / "models" / name.replace("/", "--")
