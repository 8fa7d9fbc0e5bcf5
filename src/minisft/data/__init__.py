"""Conversations to token ids and labels: exact, accounted for, and the same for training and inference.

Enters: the sources of a recipe (files, folders, hub data sets) and a tokenizer. Leaves: `<output>/dataset` with the
splits `train` and `test` (columns input_ids and labels) and `ledger.json`, which accounts for every row and token.

The way of a row, in reading order:

- sources, readers: what the recipe names, as chunks of raw rows, each with its file and line
- formats, conversation: a raw row to a `Conversation`, or an error that says what is wrong with the row
- renderers/: a conversation to segments of text and control tokens, with the answers marked
- encoder, segment_encoder: segments to input_ids and labels
- truncation: what happens past `max_length`
- verification: the supervised tokens of the row are its answers and their terminators
- pipeline: a chunk of rows through all of these, in this process or in several
- split, shards: all rows in one Arrow file, then in two data sets
- stats, fingerprint: the ledger, and what the data set was made from
- preparation: the whole of it, with the cache; prepared reads its result
- inspect: shows rows with their supervised tokens

Invariants: labels are -100 or the row's own id; text that a user typed never becomes a control token; read = kept +
skipped; `Encoder` is what training, evaluation and chat share, so that a prompt at inference is a prefix of the
training row.
"""
