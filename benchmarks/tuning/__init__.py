"""What the tuning benchmarks, `benchmarks.tune` and `benchmarks.tune_native`, are made of."""
