"""`fit_factors` as a Ray job: `ray job submit -- python jobs/fit_factors.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit_factors", *sys.argv[1:]]))
