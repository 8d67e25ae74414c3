"""Benchmarks, and what was measured; README.md says which program answers what."""
