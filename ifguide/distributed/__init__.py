"""The Ray cluster: sessions, pools of workers over shards with a ledger, tasks.

It alone imports ray, beside the training stage, which starts Ray Train.
"""
