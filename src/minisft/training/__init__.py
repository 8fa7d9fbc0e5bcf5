"""Batches to checkpoints: the Hugging Face Trainer with an exact loss, on one process or many.

Enters: a recipe and a prepared data set. Leaves: `checkpoints/checkpoint-N` (plain model folders), `metrics.jsonl`,
`model/`.

In reading order:

- run_training: from the prepared data to the final model; worker is the process that the launcher starts
- batching: which conversations make which step, on which process, in which forward; packed rows without padding
- attention: each conversation of a packed row attends to itself alone
- sequence_parallel: processes that share the tokens of a row
- probe, model_call: whether the model is right in a packed row, in a row of its own, or not at all; its arguments
- loss: the sum over supervised tokens, a chunk of logits at a time
- trainer: the optimizer step, and how a checkpoint is written and resumed
- callbacks, step_metrics, held_out: what is logged, the held-out loss, stopping at the end of a step
- optimization, lora, device: optimizers and schedules, adapters, number formats and cores
- zero, resharding: DeepSpeed's ZeRO stages, and resuming under another layout
- checkpoints, integrity, disk: atomic and pruned, proven to be intact, and counted before the first step
- distributed, nodes: several processes, several machines

Invariants: the loss of a step is the mean over its supervised tokens across micro-steps and processes, whatever the
split of the batch and the strategy; a checkpoint gets its name when every process has written its part; a resumed run
takes the steps that it would have taken.
"""
