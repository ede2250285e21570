"""`build_mask` as a Ray job: `ray job submit -- python jobs/build_mask.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["build_mask", *sys.argv[1:]]))
