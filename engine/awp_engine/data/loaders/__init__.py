"""What brings images from where they lie to where they are trained on: memory, DALI, or torch."""
