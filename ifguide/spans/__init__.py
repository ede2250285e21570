"""Spans of characters: a mask that any tokenizer can take up.

`mapping` goes between tokens and characters, `tables` does so for a corpus in shards, and `filling` makes the mask of
a whole corpus from spans.
"""
