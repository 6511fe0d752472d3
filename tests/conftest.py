"""Float64 by default, eight CPU devices, strict rank promotion, jaxtyping's shapes checked.

`LORAPRO_TEST_X64=0 pytest -m float32` runs what users without float64 see.
"""

import os
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

X64 = os.environ.get("LORAPRO_TEST_X64", "1") != "0"
jax.config.update("jax_enable_x64", X64)
jax.config.update("jax_num_cpu_devices", 8)  # of this process: those that tests start have theirs
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program that comes again, in this process or in one that a test starts, is compiled once.
# Every worker has a cache of its own: an entry is not written at once.
_cache = tempfile.TemporaryDirectory(prefix="lorapro-tests-", ignore_cleanup_errors=True)
for _name, _value in {
    "jax_compilation_cache_dir": _cache.name,
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

# What is tested once more without float64 is compiled there as users compile it. Most programs here
# run a few times only and take longer to compile than to run, also in processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(X64)))
jax.config.update(
    "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
)
# XLA's older emitter of CPU kernels compiles faster; jaxlib 0.11 has it no more, and an unknown
# flag would end the process.
_EMITTER = "--xla_cpu_use_fusion_emitters=false"
if X64 and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EMITTER}".strip()

install_import_hook("lorapro_jax", "beartype.beartype")


def pytest_unconfigure():
    _cache.cleanup()


@pytest.fixture
def x64():
    """For tests whose truth is a float64 one: skipped in the leg that runs without x64."""
    if not jax.config.jax_enable_x64:
        pytest.skip("float64 is off in this run")
