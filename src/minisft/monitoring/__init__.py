"""What is looked at while a training runs: how far it has come, its table in the terminal, and the runs of a folder.

Enters: run folders, which another process may be writing. Leaves: nothing but text in the terminal, or JSON.

Read the files in this order:
- run_progress.py: how far a run has come, from its newest logged steps
- progress_table.py: the table of a training in a terminal, which `train` shows too
- run_watch.py: `watch`: the training of another process, shown until it ends
- run_list.py: `runs`: the runs below a folder

What holds:
- Only files of the run are read, complete lines alone, and no torch is imported.
- The process that trains never waits for one that looks.
"""
