"""Other forms of LoRA-Pro's Muon, to choose by."""
