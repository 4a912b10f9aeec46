"""Benchmarks: the published ixy tables, beside C on the same machine in the same run. See `python -m bench -h`."""
