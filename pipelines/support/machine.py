"""The machine: what seconds and pictures depend on, to be recorded with them."""

import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(pipe: Any) -> dict[str, Any]:
    """Hardware, versions, dtype and commit, to be recorded with every number."""
    packages = ("diffusers-guidance", "diffusers", "transformers", "torch")
    cuda = pipe.device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "pipeline": type(pipe).__name__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit(),
    }


def seconds() -> float:
    """The clock that times pictures. Without an accelerator it runs while the calling thread has a core, so that other
    work on the machine does not count. With one it always runs, since the thread waits for the device."""
    return time.perf_counter() if torch.accelerator.is_available() else time.thread_time()


def machine(device: str | None) -> str:
    """What seconds depend on, as far as known before anything is loaded."""
    cuda = torch.cuda.is_available() and not (device or "cuda").startswith("cpu")
    name = torch.cuda.get_device_name(device if cuda and device else None) if cuda else device or "cpu"
    return f"{_processor()}, {torch.get_num_threads()} threads, {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit of this package's checkout, with "+" if it was changed since; None if installed."""
    where = Path(__file__).parents[2]
    try:
        command = ("git", "-C", str(where), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
        tracked = subprocess.run(
            (*command[:3], "ls-files", "--error-unmatch", __file__), capture_output=True, timeout=9
        )
        if tracked.returncode:
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=9).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
