"""Evaluation: generate answers to held-out conversations with every checkpoint, score them, and find the best one.

Input: a run folder. Output: `evaluation/results.json` and, for each model, `outputs.jsonl` and `examples.txt`.

In reading order:

- run_evaluation: scores the base model and every checkpoint, one after the other, and writes results.json after each
- monitor: which models to score, and waiting for a running training
- examples: the prompts and references, which are the same for every model
- evaluator: answers and held-out loss of one model, read from the result cache if they were computed before
- backends, vllm_model: transformers or vLLM, in this process or in several
- placement, batch_memory: how many GPUs share a model, and how many rows fit into memory
- generation, kv_cache: the only decoding loop, with sampling and streaming; chat and the server use it too
- metrics: BLEU, chrF, means over answers, intervals and p-values, held-out loss, the constant baseline
- resampling: the bootstrap resamples of rows behind every interval and p-value
- custom_metrics, row_metrics: metrics of one number per answer: the caller's own, and those that a recipe names
- retention: the loss on texts of the user's own
- judge, judge_questions, judge_client: a model behind an OpenAI-compatible server compares and grades the answers
- benchmarks: tasks of lm-evaluation-harness on the base model and every checkpoint
- contamination: test rows and benchmarks in the training data, and the scores without them
- score_tables: the tables that are printed
- result_files: the result cache, and the files for people to read

Invariants:

- A prompt has exactly the token ids that training rendered up to the answer.
- Nothing is computed twice for the same weights, prompt and settings.
- Greedy answers depend neither on the batch nor on the number of processes.
"""
