"""Float64 by default, strict rank promotion, jaxtyping's shapes checked at run time."""

import os
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", os.environ.get("LORAPRO_TEST_X64", "1") != "0")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program that takes long to compile and comes again, in this process or in one that a test
# starts, is compiled once. Every worker has a cache of its own: an entry is not written at once.
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
_OPTIMISED = os.environ.get("LORAPRO_TEST_X64", "1") == "0"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(not _OPTIMISED)))
jax.config.update(
    "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
)
# With XLA's older emitter of CPU kernels, which jaxlib 0.11 has no more, a test of the
# transformation takes two thirds of its time. An unknown flag would end the process.
_EMITTER = "--xla_cpu_use_fusion_emitters=false"
if not _OPTIMISED and jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EMITTER}".strip()

install_import_hook("lorapro_jax", "beartype.beartype")


# Those that take longest, first: no worker ends alone with one of them.
FIRST = (
    "test_multihost", "test_finetune", "test_transform", "test_contract", "test_programs",
    "test_solvers", "test_trainers", "test_t5", "test_presets", "test_choices", "test_readme",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_unconfigure():
    _cache.cleanup()


@pytest.fixture
def x64():
    """For tests whose truth is a float64 one: skipped in the leg that runs without x64."""
    if not jax.config.jax_enable_x64:
        pytest.skip("float64 is off in this run")
