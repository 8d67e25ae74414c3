"""Checks of whether a robust accuracy can be believed."""
