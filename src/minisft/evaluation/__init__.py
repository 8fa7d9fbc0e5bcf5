"""Checkpoints to scores: generate on held-out conversations, score, and find the checkpoint that is best.

Enters: a run folder. Leaves: `evaluation/results.json` and, for each model, `outputs.jsonl` and `examples.txt`.

In reading order:

- run_evaluation: the base model and every checkpoint, one after the other, and what is written after each
- monitor: which models are to be scored, and waiting for a running training
- examples: the prompts and references, the same for every model
- evaluator: answers and held-out loss of one model, taken from its result cache where they were computed before
- backends: who generates, transformers or vLLM, in this process or in several
- generation, kv_cache: the only decoding loop, with sampling and streaming; chat uses it too
- metrics: BLEU, chrF, exact match, intervals and p-values, held-out loss, the constant baseline
- result_files: the result cache and the files to read

Invariants: a prompt is the rendering of training up to the answer, id for id; nothing is computed twice for the same
weights, prompt and settings; greedy answers do not depend on the batch or on the number of processes.
"""
