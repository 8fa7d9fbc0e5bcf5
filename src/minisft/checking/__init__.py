"""Checks, on the user's own recipe, model and machine, that training does what MiniSFT promises.

Enters: a recipe and its run folder. Leaves: a `Result` for each check, and the content of `check.json`.

Read the files in this order:
- run_checks.py: the list of checks in their order, how they run, and their table in the terminal
- result.py: what a check is, and its result
- context.py: the recipe's tokenizer, rows and model, each created when a check needs it
- data_checks.py: rows, labels and control tokens; no weights are needed
- serving_checks.py: prompts, stop tokens and saved templates; no weights are needed
- loss_checks.py: the loss on real rows: mask, padding, packing, splits of a batch
- strategy_checks.py: the steps of the strategy, its checkpoints, and its memory and time
- overfit_check.py: whether the model can overfit a few rows
- scratch.py: a few real steps in a scratch folder, in separate processes
- reference.py: a plain padded implementation, independent of MiniSFT's training, for comparison

What holds:
- A check returns what it compared, or raises `Failed` with a fix, or `NotRun` with the reason.
- An error in one check never ends the others; a stop signal ends all of them.
- Nothing that the checks train stays: the scratch folder is deleted at the end.
- A check depends on the checks in its `needs` alone, which come before it.
"""
