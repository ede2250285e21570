"""`pretrain` as a Ray job: `ray job submit -- python jobs/pretrain.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
