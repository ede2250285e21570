"""`compare` as a Ray job: `ray job submit -- python jobs/compare.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
