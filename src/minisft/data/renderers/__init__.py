"""Chat templates: from the messages of a conversation to segments of text and control tokens."""
