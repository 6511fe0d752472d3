"""The birth certificate of a measurement: versions, hardware, commit and time, ready for JSON."""

import os
import pathlib
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def provenance() -> dict:
    """Versions, hardware, commit and UTC time, as a dict of JSON values.

    Outside a checkout the commit is $LORAPRO_COMMIT or None, and `dirty` (tracked files differ from
    it) is None.
    """
    devices = jax.devices()
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "cpu": _cpu_model(),
        "cpu_count": cores or os.cpu_count(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "platform": devices[0].platform,
        "commit": commit or os.environ.get("LORAPRO_COMMIT"),
        "dirty": None if changes is None else bool(changes),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    # platform.processor() is empty or just the architecture on Linux.
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout, or no git: the record says so
    return done.stdout.strip()
