"""The birth certificate of a measurement: versions, hardware, commit and time, ready for JSON."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def _cpu_model() -> str:
    # platform.processor() is empty or just the architecture on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_count() -> int:
    """The cores that this process may use, which a container often limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout, or no git: the record says so
    return done.stdout.strip()


def provenance() -> dict:
    """Versions, hardware, commit and UTC time, as a dict of JSON values.

    Returns:
      versions: {package: version}; cpu, cpu_count, device (kind), device_count, platform;
      commit (outside a checkout $LORAPRO_COMMIT, or None), dirty (tracked files differ from it;
      None outside); time, ISO 8601 UTC.
    """
    devices = jax.devices()
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    return {
        "versions": _versions(),
        "cpu": _cpu_model(),
        "cpu_count": _cpu_count(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "platform": devices[0].platform,
        "commit": commit or os.environ.get("LORAPRO_COMMIT"),
        "dirty": None if changes is None else bool(changes),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
