"""Training: batches of windows, the Lightning module around backbone and loss, one call to fit."""
