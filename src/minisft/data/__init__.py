"""Conversations to token ids and labels: exact, accounted for, and the same for training and inference.

Input: the sources of a recipe (files, folders, hub data sets) and a tokenizer. Output: `<output>/dataset` with the
splits `train` and `test` (columns input_ids and labels) and `ledger.json`, which accounts for every row and token.

The files in reading order, which is the order in which a row passes through them:

- in_memory: rows that a program passes become a file, which is read as every other file
- sources, readers: the files and hub data sets of the recipe to chunks of raw rows, each with its file and line
- formats, conversation: a raw row to a `Conversation`, or an error that names the fault of the row
- renderers/, unrolling: a conversation to segments of text and control tokens, with the answers marked; one row, or one
  per answer where the template writes earlier answers otherwise
- encoder, segment_encoder: segments to input_ids and labels
- truncation: rows above `max_length` lose complete exchanges, or the end of an answer
- verification: the supervised tokens of a row are its answers and their terminators
- pipeline: a chunk of rows through all of these steps, in one process or in several
- split, shards: all rows to one Arrow file, then to the two splits
- stats, fingerprint: the ledger, and a hash of each thing that the data set depends on
- near_duplicates, ngram_overlap: texts that nearly repeat others, or share long passages with them
- preparation: all steps, with the cache
- prepared, prepared_data, inspect: read the prepared rows, and show them with their supervised tokens

Invariants: labels are -100 or the row's own id; text that a user typed never becomes a control token; rows read = rows
kept + rows skipped; training, evaluation and chat share the `Encoder`, so that a prompt at inference is a prefix of
the training row.
"""
