"""Memory and time before training: what a recipe needs under each strategy, and which strategy to take.

Enters: a recipe, the lengths of its data, and a machine (this one, or GPUs by name). Leaves: a `Plan`.

- planner: the job that a recipe describes, every setting that could train it, and the choice among them
- model_cost: activations and operations of the model, counted on the meta device without weights
- workload: steps, rows and the largest row, from the lengths of the conversations
- machines: data sheets of GPUs; this CPU measured, with the layer benchmark
- memory, prediction: memory of a process, and memory and time of one setting
- auto: `strategy: auto`, the plan's choice confirmed by a trial step
- plan_table: the plan in the terminal and as JSON
"""
