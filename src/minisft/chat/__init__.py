"""Chat with a run's model, or with any model folder."""
