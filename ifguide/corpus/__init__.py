"""Documents to packed blocks: reading, tokenising, packing, and the tables of a corpus."""
