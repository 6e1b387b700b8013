"""Benchmarks of real nodes on this machine, each beside the raw limits of the same run: `python -m bench --help`."""
