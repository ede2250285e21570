"""`fit_student` as a Ray job: `ray job submit -- python jobs/fit_student.py --config F [--set a.b=c] [--dry-run]`."""

import sys

from ifguide.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit_student", *sys.argv[1:]]))
