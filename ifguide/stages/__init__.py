"""One module per verb, and the only package that imports ray.

Every stage is a function `stage(run: Run, *, dry_run: bool) -> Manifest | None`: it checks that its inputs are
complete and belong together, opens its artifact, does what is not done yet, checks rows in = rows out, and
publishes its manifest last.
"""
