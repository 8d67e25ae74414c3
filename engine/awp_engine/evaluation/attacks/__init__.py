"""Attacks to measure by, by their names."""
