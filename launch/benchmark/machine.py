"""What the record says of hardware, software and revision."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """Name and number of the devices, driver and CUDA release."""
    if device.type != "cuda":
        return {"name": _cpu(), "count": 0, "driver": None, "cuda": None}
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": torch.cuda.get_device_name(device),
        "count": torch.cuda.device_count(),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()})"


def versions(package: str) -> dict[str, str | None]:
    """Of Python, torch, Triton, this library, and one more distribution."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    found |= {"triton": installed("triton"), "cce_tp": installed("cce-tp")}
    if package not in ("torch", "cce-tp"):
        found[package] = installed(package)
    return found


def communication() -> dict[str, str]:
    """Environment variables that change how collectives run, and beside what."""
    names = sorted(name for name in os.environ if name.startswith("NCCL_"))
    names.append("CUDA_DEVICE_MAX_CONNECTIONS")
    return {name: os.environ[name] for name in names if name in os.environ}


def installed(package: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Revision of the checkout this runs from, with "-dirty" if it is changed, or None."""
    folder = str(Path(__file__).parent)
    revision = _first_line("git", "-C", folder, "rev-parse", "HEAD")
    if revision is None:
        return None
    changed = _first_line("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return revision + ("-dirty" if changed else "")


def _first_line(*command: str) -> str | None:
    """First line of a command's output, None if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None
