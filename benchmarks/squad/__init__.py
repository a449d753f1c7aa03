"""The SQuAD benchmark: `python -m benchmarks.squad --help`."""
