"""Runs side by side: read from their directories, grouped by their settings, as tables, curves and one page.

Nothing here imports torch, or runs or loads anything that a run directory holds but numbers and text.
"""
