"""The benchmark program of conv_ops: `python -m benchmarks --help`, from the checkout's root.

How the numbers are made is told in docs/benchmarking.md.
"""
