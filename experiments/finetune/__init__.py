"""Fine-tuning one run after the other: from the command line to a run folder."""
