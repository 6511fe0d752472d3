"""Tasks: their examples, as token batches of a few lengths, or as prompts and answers."""
