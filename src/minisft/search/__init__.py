"""The best settings within a budget."""
