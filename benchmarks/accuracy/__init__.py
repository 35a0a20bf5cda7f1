"""What a token budget costs in accuracy: `python -m benchmarks.accuracy MODEL --out DIR`."""
