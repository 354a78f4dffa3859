"""Headless Chromium: what a page is like for the people who see it."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--virtual-time-budget=5000",
]


def page_as_shown(url: str, profile: Path) -> str:
    """Gives the document as the browser has it after it has loaded a page."""
    return _run(profile, "--dump-dom", url)


def take_picture(url: str, profile: Path, picture: Path, *, size: str = "1000,800") -> None:
    """Writes a picture of a page."""
    _run(profile, f"--screenshot={picture}", f"--window-size={size}", url)


def _run(profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
