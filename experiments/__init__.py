"""The experiments: fine-tuning runs, training steps compiled for pods, and their results."""
