"""Export of a run's model for other tools, and the proof that it behaves there as it was trained."""
