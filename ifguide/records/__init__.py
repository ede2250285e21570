"""Which files an input names, and their rows: one rule for documents, prompts and labelled texts."""
