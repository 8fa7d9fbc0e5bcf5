"""Chat templates: from the messages of a conversation to segments of text and control tokens.

Enters: the messages of a `Conversation`. Leaves: `Rendered`, a list of `Segment`s (plain text to be encoded, or one
control token) with the answers and their terminators marked as supervised, and findings about the row.

- templates: the templates by name, their stop tokens, and the Jinja text that is saved with the model
- base: `Segment`, `SegmentBuilder`, and the renderer of the turn templates (ChatML, Llama 3, Zephyr)
- mistral: the Mistral templates, as mistral-common renders them
- jinja: any other Jinja template; answers are found by rendering the conversation with placeholders in their places
- jinja_limits: the time and memory that a template may take, since it is a program that came with a model
- resolve: which of these is in use with a tokenizer, and what becomes of markers that the tokenizer lacks

One renderer writes the training row and the prompt at inference: the prompt is the rendering of the messages up to
the answer.
"""
