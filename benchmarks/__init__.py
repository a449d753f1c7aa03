"""Benchmarks of sparse_attn, run from the repository: `python -m benchmarks.squad`."""

import time

BEGUN = time.time()  # about when the process did: before torch is imported, which takes seconds
