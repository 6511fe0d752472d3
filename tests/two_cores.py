"""Many shapes at once on two cores, in a process of its own: what is tested is that it ends."""

import os
import subprocess
import sys

_PROGRAM = """
import functools, importlib, os, sys
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
import jax, jax.numpy as jnp
solver = importlib.import_module("lorapro_jax." + sys.argv[1])

rank, rounds = map(int, sys.argv[2:])
shapes = [(64 + 16 * i, 96) for i in range(8)]
keys = jax.random.split(jax.random.key(0), len(shapes))
problems = [
    (jax.random.normal(k, (16, m, rank)), jax.random.normal(k, (16, rank, n)))
    for k, (m, n) in zip(keys, shapes)
]

@jax.jit
def step(problems):
    solve = functools.partial(solver.solve, s=jnp.float32(2), damping=jnp.float32(1e-6))
    return [jax.vmap(lambda a, b: solve(a, b, a, b))(a, b) for a, b in problems]

for _ in range(rounds):
    jax.block_until_ready(step(problems))
"""


def run(module: str, rank: int, rounds: int, **environment: str) -> None:
    """Solves by lorapro_jax.<module>; raises if the process fails or does not end."""
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, module, str(rank), str(rounds)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        check=True,
        timeout=120,
    )
