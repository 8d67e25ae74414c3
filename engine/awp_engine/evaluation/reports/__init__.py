"""What is written down of a measurement, and for whom."""
