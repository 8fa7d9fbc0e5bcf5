"""Proofs, on the user's own recipe, model and machine, that training does what it promises.

Enters: a recipe. Leaves: a `Result` for each check, and `check.json`.

- run_checks: the list of checks in their order, and the table in the terminal
- result: what a check is, and its result
- context: the recipe's tokenizer, rows and model, each made when a check first asks for it
- data_checks, serving_checks: tokens, labels and prompts; no weights are needed
- loss_checks, strategy_checks, overfit_check: the loss, the steps of the strategy, its checkpoints and cost, learning
- scratch: a few real steps in a scratch folder, in processes of their own
- reference: plain padded arithmetic, independent of MiniSFT's training, to compare with
"""
