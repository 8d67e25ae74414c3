"""What moves the weights: SGD, AdamW and optimizers by name, their schedules, and averages of weights."""
