"""What the library costs: time of an update and a training step, compile time, TPU cycles."""
