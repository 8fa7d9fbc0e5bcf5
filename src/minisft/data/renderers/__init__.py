"""Chat templates: from the messages of a conversation to segments of text and control tokens.

Input: the messages of a `Conversation`. Output: `Rendered`, a list of `Segment`s (plain text to be encoded, or one
control token) with the answers and their terminators marked as supervised, and findings about the row.

- templates: the templates by name, their stop tokens, and the Jinja text that is saved with the model
- base: `Segment`, `SegmentBuilder`, and the renderer of the turn templates (ChatML, Llama 3, Zephyr)
- mistral: the Mistral templates, as mistral-common renders them
- mistral_versions: which of them a tokenizer is made for
- mistral_jinja: the Jinja text of each, which is saved with the model
- jinja: any other Jinja template; answers are found by rendering the conversation with placeholders in their places
- reasoning: the keys under which templates read reasoning, and the text that they write around it
- template_options: values for the variables of a Jinja template
- jinja_limits: limits of time and memory for a template, since it is a program that came with a model
- resolve: finds the template that a recipe names, and adapts it to a tokenizer, which may lack some markers

The same renderer writes the training row and the prompt at inference: the prompt is the rendering of the messages
before the answer.
"""
