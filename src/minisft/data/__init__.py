"""Conversations to token ids and labels: exact, accounted for, and the same for training and inference."""
