"""What a fleet of GPUs that nobody has at hand would do: `python -m benchmarks.simulation`."""
