"""What `compare` compares: masks found by other means, preference training, reward models."""
