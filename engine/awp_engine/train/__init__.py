"""The trainer: its loop, what it is built from, what a checkpoint holds, and how an epoch is chosen."""
