"""Checkpoints to scores: generate on held-out conversations, score, and say which checkpoint is best."""
