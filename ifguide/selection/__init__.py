"""Algorithm 1: from token scores to a ranking and a token mask, exactly, over any number of shards.

`algorithm` is the method in steps, `passes` each step on one shard, `ranking` the units in order as an external sort,
`distributed` runs them all; `quantiles` finds tau exactly, `outliers` lists blocks that stand out, `ensemble` averages
the ranks of several runs' scores. No Ray.
"""
