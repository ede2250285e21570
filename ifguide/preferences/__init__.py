"""What `compare` trains on scored continuations: `pairs` for `dpo`, rated texts for the `reward_model` of RAD."""
