"""Training: batches on the device, backbone and loss step by step, checkpoints, several ranks."""
