"""One module per verb. Ray is imported in `distributed/`, and here by Ray Train's stage alone.

Every stage is a function `stage(run: Run, *, dry_run: bool) -> Manifest | None`: it checks that its inputs are
complete and belong together, opens its artifact, does what is not done yet, checks rows in = rows out, and
publishes its manifest last.
"""
