"""The decoder against numpy; costs read off HLO against sums by hand; the command's doors."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from experiments.models import llama
from experiments.pod import command as pod
from experiments.pod import slice as pod_slice
from experiments.pod import step as pod_step
from experiments.pod import workloads as pod_work
from experiments.pod.costs import cost

ROOT = pathlib.Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason=f"the TPU compiler is not installed: {pod_slice.LIBTPU}",
)


# The decoder: one row at a time in float64 numpy, loops for layers, heads and positions.


def numpy_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def numpy_rotate(x, theta):
    """Pairs (i, i + H/2) as complex numbers, turned."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def numpy_layer(c, p, n, x):
    def linear(name, y):
        q = p[name]
        return y @ (q["kernel"][n] + 2.0 * q["lora_a"][n] @ q["lora_b"][n])

    y = numpy_norm(x, p["attention_norm"]["scale"][n])
    q, k, v = linear("q", y), linear("k", y), linear("v", y)
    heads = []
    for h in range(c.num_attention_heads):
        shared = h // (c.num_attention_heads // c.num_key_value_heads)
        own, theirs = (slice(i * c.head_dim, (i + 1) * c.head_dim) for i in (h, shared))
        turned_q, turned_k = numpy_rotate(q[:, own], c.rope_theta), numpy_rotate(
            k[:, theirs], c.rope_theta
        )  # fmt: skip
        rows = []
        for t in range(len(x)):
            weights = np.exp(turned_k[: t + 1] @ turned_q[t] / np.sqrt(c.head_dim))
            rows.append(weights / weights.sum() @ v[: t + 1, theirs])
        heads.append(np.stack(rows))
    x = x + linear("o", np.concatenate(heads, -1))
    y = numpy_norm(x, p["mlp_norm"]["scale"][n])
    gate = linear("gate", y)
    return x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", y))


def numpy_logits(c, p, tokens):
    x = p["embedding"]["embedding"][tokens]
    for n in range(c.num_hidden_layers):
        x = numpy_layer(c, p["layers"], n, x)
    return numpy_norm(x, p["norm"]["scale"]) @ p["head"]["kernel"]


def random_like(make, spread=0.3):
    """The model that `make` makes, with its adapters, norms and kernels all random."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, filled(shapes, spread))


def filled(shapes, spread=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * spread, x.dtype), shapes)


def decoder(dtype):
    def make():
        how = {"scanned": True, "remat": True, "dtype": dtype, "param_dtype": dtype}
        model = llama.Llama(llama.TINY, **how, rngs=nnx.Rngs(0))
        llama.adapt(model, 4, 8.0, rngs=nnx.Rngs(1))
        return model

    return random_like(make)


@nnx.jit
def logits(model, tokens):
    return model(tokens)


TOKENS = np.random.default_rng(1).integers(0, 64, (2, 11))


def test_the_decoder_is_numpys(x64):
    model = decoder(jnp.float64)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    expected = [numpy_logits(llama.TINY, params, row) for row in TOKENS]
    np.testing.assert_allclose(logits(model, jnp.asarray(TOKENS)), expected, atol=1e-10)


def test_no_position_sees_a_later_token():
    model = decoder(jnp.float32)
    changed = TOKENS.copy()
    changed[:, 7:] = 63 - changed[:, 7:]
    before, after = logits(model, jnp.asarray(TOKENS)), logits(model, jnp.asarray(changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7], after[:, 7])


def test_the_loss_is_the_mean_surprise_of_the_next_tokens():
    model = decoder(jnp.float32)
    shares = np.exp(logits(model, jnp.asarray(TOKENS)))
    shares /= shares.sum(-1, keepdims=True)
    surprises = [
        -np.log(shares[b, t, TOKENS[b, t + 1]])
        for b in range(len(TOKENS))
        for t in range(TOKENS.shape[1] - 1)
    ]
    found = nnx.jit(llama.next_token_loss)(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, np.mean(surprises), rtol=1e-5)


def test_llama3_8b_has_the_published_number_of_parameters():
    model = nnx.eval_shape(lambda: llama.Llama(llama.LlamaConfig(), scanned=True, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 8_030_261_248


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": 3}, {"head_dim": 7}])
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ValueError, match="num_key_value_heads|head_dim"):
        llama.LlamaConfig(**wrong)


# The step


@pytest.mark.parametrize(
    "mode",
    [pytest.param(x, marks=() if x == "factored" else pytest.mark.slow) for x in pod_step.MODES],
)
def test_the_step_that_is_compiled_trains(mode):
    work = pod_work.decoder(llama.TINY, 4, 16, 4)
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)), jnp.int32)
    losses = trained(work, mode, batch, 1e-2)
    assert losses[-1] < losses[0] - 0.05


def trained(work, mode, batch, rate):
    """The losses of eight steps from random parameters."""
    trainable, frozen = filled((work.trainable, work.frozen))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    tx = pod_step.optimizer(mode, work, rate)
    with jax.set_mesh(mesh):
        step = pod_step.make(work, mode, mesh, rate)
        # placed as the step leaves them, so that it is compiled once
        given = (trainable, jax.jit(tx.init)(trainable), frozen, batch)
        trainable, state, *fixed = jax.tree.map(
            jax.device_put, given, jax.tree.map(lambda x: x.sharding, step.args)
        )
        losses = []
        for _ in range(8):
            trainable, state, loss = step.jitted(trainable, state, *fixed)
            losses.append(float(loss))
    assert np.all(np.isfinite(losses))
    return losses


FEW = 16  # bytes a pair, on every chip: full mode keeps a few numbers of it beside the moments


def abstract(fsdp, tensor):
    return AbstractMesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("sizes", [(256, 1), (32, 8)])
def test_every_chip_holds_its_share_of_llama3_8b(sizes):
    work = pod_work.decoder(llama.LlamaConfig(), 256, 2048, 16)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    norms = 65 * 4096
    steps = {
        mode: pod_step.make(work, mode, abstract(*sizes)) for mode in ("lora", "chain", "full")
    }
    trainable, state, frozen, _ = map(pod_step.bytes_per_chip, steps["lora"].args)
    assert frozen == 2 * ((linear + 2 * 128_256 * 4096) // 256 + norms)
    factors = 4 * 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    repeated = sizes[1] > 1  # factors whose one long axis only fsdp divides
    assert trainable == factors // 256 if not repeated else trainable <= factors // 32
    assert 0 <= state - 2 * trainable <= 64  # counts of steps
    assert pod_step.bytes_per_chip(steps["chain"].args[1]) == state
    full = pod_step.bytes_per_chip(steps["full"].args[1])
    assert 0 <= full - 2 * 4 * linear // 256 <= 64 + FEW * 7 * 32


# Costs

# The entry: 7 cycles, three rounds of the outer loop, the dearer branch (40), a custom call, and a
# copy and a fusion that have no estimate. An outer round: 5 cycles, 1 of its condition, and four
# inner rounds of 11 each. 7 + 3 (5 + 1 + 4 x 11) + 40 = 197. The computations of fusions and the
# scalars, all with an estimate of 1000, do not count: the fusion that calls them does.
NESTED = """HloModule nested, is_scheduled=true, num_partitions=1

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} add(%p, %p), backend_config={"window":{"estimated_cycles":"1000"}}
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mul"}, \
backend_config={"estimated_cycles":"11"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %y)
}

%inner_condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}

%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %zero = s32[] constant(0)
  %w = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}, \
backend_config={"estimated_cycles":"5"}
  %start = (s32[], f32[8]{0}) tuple(%zero, %w)
  ROOT %loop = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
}

%outer_condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %test = pred[] fusion(%t), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1"}
}

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"30"}
}

%dear (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"40"}
}

ENTRY %main (x: f32[8], k: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %k = s32[] parameter(1)
  %seven = f32[8]{0} slice(%x), slice={[0:8]}, backend_config={"estimated_cycles":"7"}
  %buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %eigh = f32[8]{0} custom-call(%seven), custom_call_target="EighTpu"
  %moved = f32[8]{0} copy(%eigh)
  %first = (s32[], f32[8]{0}) tuple(%k, %moved)
  %outer = (s32[], f32[8]{0}) while(%first), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"3"}}
  %z = f32[8]{0} get-tuple-element(%outer), index=1
  %v = f32[8]{0} conditional(%k, %z, %z), branch_computations={%cheap, %dear}
  ROOT %result = f32[8]{0} fusion(%v), kind=kLoop, calls=%fused
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_conditional_its_dearest_branch():
    found = cost(NESTED)
    assert found.cycles == 197
    assert found.kernels == 1 + 3 * (1 + 1 + 4) + 1
    assert found.unknown_loops == ()


def test_a_conditional_of_two_named_branches_counts_the_dearer():
    """A form of the TPU's compiler, for products that are split over chips."""
    named = "true_computation=%cheap, false_computation=%dear"
    assert cost(NESTED.replace("branch_computations={%cheap, %dear}", named)).cycles == 197


def test_a_custom_call_is_named():
    assert cost(NESTED).custom_calls == ("EighTpu",)


def test_a_loop_whose_trips_cannot_be_read_counts_once_and_is_named():
    found = cost(NESTED.replace('"known_trip_count"', '"other"'))
    assert found.cycles == 7 + (5 + 1 + 4 * 11) + 40
    assert found.unknown_loops == ("%outer",)


# The TPU backend's forms of collectives, as it writes them: one in two kernels, one in a loop.
TPU = """HloModule made, num_partitions=16

%start (p.0: bf16[256,1024]) -> (bf16[256,1024], bf16[4096,1024]) {
  %p.0 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[256,1024]{1,0}, bf16[4096,1024]{1,0}) custom-call(%p.0, %all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.1: bf16[256,1024]) -> bf16[4096,1024] {
  %p.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%body (t.1: (s32[], bf16[256,1024])) -> (s32[], bf16[256,1024]) {
  %t.1 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %x.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%t.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %part = bf16[4096,1024]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kCustom, calls=%async_collective_fusion.2
  %permute = (bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %permuted = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%permute)
  ROOT %out = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) tuple(%next, %x.1)
}

%condition (t.2: (s32[], bf16[256,1024])) -> pred[] {
  %t.2 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (w: bf16[256,1024]) -> (s32[], bf16[256,1024]) {
  %w = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begun = (bf16[256,1024]{1,0}, bf16[4096,1024]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %in = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) tuple(%zero, %w)
  ROOT %loop = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}) while(%in), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_collective_in_several_kernels_counts_where_it_is_started():
    assert cost(TPU).sent["all-gather"] == 15 * 2 * 256 * 1024


def test_a_collective_in_an_unrolled_loop_counts_its_trips():
    assert cost(TPU).sent["collective-permute"] == 4 * 2 * 256 * 1024


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        cost("module @jit_f {}")


EIGHT_CHIPS = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from experiments.pod.costs import cost

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

def f(v):
    gathered = jax.lax.all_gather(v, "x", tiled=True)
    scattered = jax.lax.psum_scatter(gathered, "x", tiled=True)
    def body(carry, _):
        return jax.lax.psum(jnp.sin(carry), "y"), None
    carry, _ = jax.lax.scan(body, scattered, length=5)
    return jax.lax.ppermute(carry, "x", [(i, (i + 1) % 4) for i in range(4)])

mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
text = mapped.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()
print(json.dumps(cost(text).sent))
"""


def run(*args, flags="", **environment):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )


def test_collectives_of_eight_devices_by_hand():
    done = run("-c", EIGHT_CHIPS, flags="--xla_force_host_platform_device_count=8")
    assert done.returncode == 0, done.stderr
    shard = 4 * (64 // 4) * 16
    assert json.loads(done.stdout) == {
        "all-gather": 3 * shard,  # groups of 4: a ring passes 3 shards on
        "reduce-scatter": 3 * shard,
        "all-reduce": 5 * shard,  # 2 (n - 1) / n of a shard, n = 2, five times
        "collective-permute": shard,
    }


# The command


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--topology", "v9:4x4"], "unknown TPU generation 'v9'"),
        (["--topology", "v5e"], "v5e:4x4"),
        (["--topology", "v5e:4x"], "v5e:4x4"),
        (["--mesh", "3x3"], "product must be 256"),
        (["--mesh", "256"], "FSDPxTENSOR"),
        (["--mode", "ful"], "did you mean 'full'"),
        (["--mode", "sgd"], "unknown mode 'sgd'"),
        (["--model", "llama3"], "did you mean 'llama3-8b'"),
        (["--batch", "100"], "multiple of 256"),
        (["--length", "1"], "--length 1 is out of range; choose a number from 2 to"),
        (["--model", "llama3-70b"], "did you mean"),
        (["--rank", "0"], "--rank 0 is out of range; choose a number from 1 to"),
    ],
)
def test_what_cannot_be_served_is_an_error_with_a_remedy(args, says, capsys, tmp_path):
    assert pod.main([*args, "--results", str(tmp_path / "r.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert not list(tmp_path.iterdir())


def test_an_update_has_its_share_of_the_step_and_a_step_that_does_not_fit_has_none():
    figures = {"cycles": 4e6, "sent_bytes": 6e6}
    row = {"variant": "lora", "update": figures, "fits": True, "cycles": 4e8, "total_bytes": 3e9}
    too_large = {"variant": "full", "update": {}, "fits": False, "compiler_says": "Used 20G"}
    columns = pod.table([row, too_large], pod.Settings()).columns
    cells = {column.header: list(column.cells) for column in columns}
    assert cells["total GB"] == ["3", "-"]
    assert cells["of the step"] == ["1.000%", "nan%"]
    assert cells["fits"] == ["yes", "no: Used 20G"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_error_says_what_to_install(tmp_path):
    out = tmp_path / "r.jsonl"
    done = run("-m", "experiments.pod", "--model", "tiny", "--results", str(out))
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: libtpu, which holds the TPU compiler, is not installed; `{pod_slice.LIBTPU}`\n"
    )


@pytest.mark.slow
@needs_libtpu
def test_an_unknown_shape_of_slice_is_an_error(tmp_path):
    out = tmp_path / "r.jsonl"
    done = run("-m", "experiments.pod", "--topology", "v5e:3x5", "--model", "tiny",
               "--results", str(out))  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: libtpu has no topology 'v5e:3x5'")


@pytest.mark.slow
@needs_libtpu
def test_the_command_compiles_for_a_slice_that_is_not_there(tmp_path):
    out = tmp_path / "r.jsonl"
    done = run("-m", "experiments.pod", "--topology", "v5e:2x2", "--model", "tiny", "--rank", "4",
               "--mode", "lora,full", "--results", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in map(json.loads, out.read_text().splitlines())}
    c = llama.TINY
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.intermediate_size
    shapes = [(c.hidden_size, n) for n in (queries, keys, keys, inner, inner)]
    shapes += [(m, c.hidden_size) for m in (queries, inner)]
    layers = c.num_hidden_layers
    factors = 4 * 4 * layers * sum(m + n for m, n in shapes) // 4  # float32, rank 4, 4 chips
    moments = 2 * 4 * layers * sum(m * n for m, n in shapes) // 4
    for row in rows.values():
        assert row["trained_bytes"] == factors
        assert row["fits"]
        assert row["loops_counted_once"] == []
        assert 0 < row["update"]["cycles"] < row["cycles"]
        assert row["sent"]["all-gather"] > 0
    assert 0 <= rows["lora"]["state_bytes"] - 2 * factors <= 64
    assert 0 <= rows["full"]["state_bytes"] - moments <= 64 + FEW * 7 * layers
    assert rows["lora"]["update"]["cycles"] < rows["full"]["update"]["cycles"]
