"""Benchmarks: time and memory of generation on this machine."""
