"""The presets: how each project of the JAX ecosystem names and lays out its LoRA factors."""

from lorapro_jax._layouts import FLAX

__all__ = ["FLAX"]
