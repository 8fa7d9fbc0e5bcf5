"""The best settings within a budget: trials that pause at rungs, compared on the same held-out rows."""
