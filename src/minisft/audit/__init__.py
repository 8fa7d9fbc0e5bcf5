"""Looking back at a run: which rows made a step's loss, and whether data, checkpoints and log are unchanged.

- `replay.py` takes steps of a run again in a scratch folder.
- `verification.py` compares a run with its certificate and with replayed steps: `minisft verify`.
- `step_rows.py` replays one step, and ranks its rows by loss and gradient norm: `minisft why --step`.
- `similar_rows.py` finds the training rows that share the most pieces with a test row: `minisft why --row`.
- `findings.py` finds rows that the losses make suspicious: `minisft why`.
- `display.py` prints the results of `why`.
"""
