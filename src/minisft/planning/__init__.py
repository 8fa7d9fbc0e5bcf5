"""Memory and time before training: what a recipe needs under each strategy, and which strategy to choose.

Enters: a recipe, the lengths of its prepared data, and a machine (this one, or GPUs by name).
Leaves: a `Plan` with a `Prediction` for every setting; for `strategy: auto`, the recipe with a strategy.

Read the files in this order:
- planner.py: collects a `Job`, predicts every setting that could train it, and chooses among them
- model_cost.py: memory and operations of a model, counted on the meta device without weights
- workload.py: steps, rows and the largest row, from the lengths of the conversations
- machines.py: data sheets of GPUs; this machine's CPU, measured, with the layer benchmark
- memory.py: memory of the largest process under one setting, part by part
- prediction.py: memory and time of one setting together
- auto.py: `strategy: auto`, the plan's choice confirmed by a trial
- plan_table.py: the plan in the terminal and as JSON
- dry_run.py: steps on GPUs that are not there, and the faults that they show
- dry_run_worker.py: the process that executes them with the real trainer
- step_trace.py: what it observes: devices, waits, collectives and memory of every operator
- fake_gpu.py, fake_gpu.cpp: the device `cuda` without a GPU

What holds:
- Sizes are bytes of the largest process, times are seconds of the busiest one.
- No weight is loaded or downloaded for a plan or a dry run; a trial trains, but writes no checkpoint.
- A prediction depends on its arguments alone; only machines.py and auto.py measure.
- Where two strategies are about as fast, the simpler one is chosen, in the order vanilla, ZeRO-1, ZeRO-2, ZeRO-3.
"""
