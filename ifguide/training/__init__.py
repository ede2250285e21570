"""The pure parts of `pretrain`: the chunked loss around the LM head, the schedule, the model card.

The objective of a token is `ifguide.training.objective`; what runs it on ranks is in `ifguide.stages`.
"""
