"""Chat with a run's model, or with any model folder.

- session: the conversation with one model: what is sent, what fits into its context, what comes back
- terminal: `minisft chat`, its commands, streaming, and Ctrl-C

A prompt is rendered by the `Encoder` that training used, and answered by the decoding loop of evaluation.
"""
