"""What moves the weights: SGD and AdamW, their schedules, and averages of weights."""
