"""`score_corpus` as a Ray job: `ray job submit -- python jobs/score_corpus.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["score_corpus", *sys.argv[1:]]))
