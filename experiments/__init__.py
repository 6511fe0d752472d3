"""The experiments: fine-tuning runs, benchmarks and their results."""
