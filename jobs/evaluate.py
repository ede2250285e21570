"""`evaluate` as a Ray job: `ray job submit -- python jobs/evaluate.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
