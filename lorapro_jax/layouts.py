"""The presets: how each project of the JAX ecosystem names and lays out its LoRA factors.

Where both leaves have three axes or more, as in scanned layers, `declare` says which are the batch.
"""

import re

from lorapro_jax._layouts import FLAX, Layout, LoRADimensionNumbers

__all__ = ["FLAX", "QWIX", "GEMMA", "OPENPI", "PEFT", "LORAX", "MAXDIFFUSION"]

QWIX = Layout(a=r"(?P<pair>.+_)lora_a", b=r"(?P<pair>.+_)lora_b")
"""Qwix, and with it Tunix and MaxText: <kernel>_lora_a beside the kernel.

An einsum's a keeps the kernel's contracted and batched axes (experts: E D rows), b the others.
"""

GEMMA = Layout(a=r"(?P<pair>(.*/)?lora)/a", b=r"(?P<pair>(.*/)?lora)/b")
"""gemma.peft: leaves a and b of a node called lora, with the kernel's axes kept."""


def _per_head(path: str, a_ndim: int, b_ndim: int) -> LoRADimensionNumbers | None:
    """openpi: all axes but the last two are heads, gates or layers, each with a pair of its own.

    The attention's output (BTNH,NHD->BTD) sums over the heads first: a (N, H, r) is one matrix of
    N H rows, and all heads' b (N, r, D) are added up.
    """
    summed = (-3,) if re.fullmatch(r"(.*/)?attn_vec_einsum(_\d+)?", path) else ()
    batch = tuple(range(a_ndim - 2 - len(summed)))
    if a_ndim != b_ndim or a_ndim < 2 + len(summed):
        return None
    return LoRADimensionNumbers(a_rank=-1, b_rank=-2, a_batch=batch, b_batch=batch, b_sum=summed)


OPENPI = Layout(a=FLAX.a, b=FLAX.b, infer=_per_head)
"""openpi (pi0): a pair for each head, and for each of the two gates, of einsum kernels."""


def _torch(path: str, a_ndim: int, b_ndim: int) -> LoRADimensionNumbers | None:
    """PyTorch's orientation, (out, in): A (r, in) and B (out, r)."""
    return LoRADimensionNumbers(a_rank=0, b_rank=1) if a_ndim == b_ndim == 2 else None


PEFT = Layout(
    a=r"(?P<pair>.+[/.])lora_A([/.][^/.]+)?[/.]weight",
    b=r"(?P<pair>.+[/.])lora_B([/.][^/.]+)?[/.]weight",
    infer=_torch,
)
"""Hugging Face PEFT, levanter, haliax: lora_A.weight, lora_A.<name>.weight (r, in), B (out, r)."""

LORAX = Layout(a=r"(?P<pair>.+)/b", b=r"(?P<pair>.+)/a")
"""lorax: LoraWeight(w, a, b), whose b (in, r) is our a and whose a (r, out) is our b.

Where other leaves are called b (Haiku's biases), narrow both patterns to the weights' names:
`dataclasses.replace(LORAX, a=r"(?P<pair>.+/w)/b", b=r"(?P<pair>.+/w)/a")`.
"""

MAXDIFFUSION = Layout(
    a=r"(?P<pair>(.*/)?[^/]*lora[^/]*)/down/kernel", b=r"(?P<pair>(.*/)?[^/]*lora[^/]*)/up/kernel"
)
"""maxdiffusion: two bias-free layers, down and up, below a node with lora in its name.

A convolution's pair, down (kh, kw, in, r) and up (1, 1, r, out), needs `declare` with
`LoRADimensionNumbers(b_rank=2)`: a 1 x 1 kernel has no batch axis.
"""
