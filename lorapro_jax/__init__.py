"""LoRA-Pro for JAX: low-rank adapters whose steps are closest to full fine-tuning."""
