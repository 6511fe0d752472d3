"""What to copy: fine-tuning loops on one screen."""
