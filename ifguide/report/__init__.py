"""What people read of a run: one HTML page, its JSON twin, a model card fragment, the table of a comparison.

`figures` are the measured figures of models, `contents` all that a report says; `page`, `card` and `comparison` write
it, with `charts` and `text`.
"""
