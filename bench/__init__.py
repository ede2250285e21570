"""Benchmarks: each figure that the docs quote, as a command.

`make setup` installs this package beside `ifguide`, so that `python bench/NAME.py` and `python -m bench.NAME` are the
same from any folder. The last line that a benchmark prints is one JSON object. What several of them need lies in
`bench.common`.
"""
