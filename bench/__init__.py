"""Benchmarks: each figure that the README or bench/*.md quotes, as a command."""
