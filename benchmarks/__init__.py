"""Benchmarks of sparse_attn, run from the repository: `python -m benchmarks.squad`."""
