"""Influence functions over tokens: EK-FAC factors, the query direction, and one score per corpus token.

`factors` fits the curvature of a proxy model (the only importer of kronfluence), `query` makes the
preconditioned direction V from it, `scorer` contracts V with the gradient of every token. All three take plain
tensors and numbers, and run on a bare machine with torch and transformers; only fitting needs kronfluence.
"""
