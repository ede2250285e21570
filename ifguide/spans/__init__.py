"""Spans of characters: a mask that any tokenizer can take up, and the text that simpler methods mark.

`mapping` goes between tokens and characters, `tables` does so for a corpus in shards, `finders` mark a text by words or
a classifier, `marks` the documents of a corpus.
"""
