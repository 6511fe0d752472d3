"""Float64 by default, strict rank promotion, jaxtyping's shapes checked at run time."""

import os

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", os.environ.get("LORAPRO_TEST_X64", "1") != "0")
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("lorapro_jax", "beartype.beartype")


@pytest.fixture
def x64():
    """For tests whose truth is a float64 one: skipped in the leg that runs without x64."""
    if not jax.config.jax_enable_x64:
        pytest.skip("float64 is off in this run")
