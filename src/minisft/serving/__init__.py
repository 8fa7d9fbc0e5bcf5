"""A run's models behind an OpenAI-compatible server, and the chat page that it shows."""
