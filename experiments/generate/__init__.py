"""Texts that a fine-tuned model, or its base, writes after prompts."""
