"""`build_query` as a Ray job: `ray job submit -- python jobs/build_query.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["build_query", *sys.argv[1:]]))
