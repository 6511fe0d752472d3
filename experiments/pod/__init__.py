"""Training steps compiled for TPU slices, on a machine without one."""
