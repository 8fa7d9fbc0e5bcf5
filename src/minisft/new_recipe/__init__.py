"""`init`: a commented recipe for the user's own data, model and machine.

Enters: the conversations, the name of a model, and this machine or the name of a GPU.
Leaves: a recipe file in which each value has its reason; nothing else is written.

Read the files in this order:
- init.py: the command, step by step
- data_survey.py: what the rows hold, and their lengths in the model's tokens
- choices.py: the rule and the source of each value
- machine_fit.py: full fine-tuning, checkpointing or LoRA, by what fits, and what it costs
- findings.py: what was found and chosen, as lines and as entries of the recipe
- recipe_text.py: values and their reasons as YAML

What holds:
- The recipe loads with the project's own reader before it is written, and no file is replaced.
- Every row is read, the rows of a sample are tokenized, and the recipe says how many.
- The rules depend on their arguments alone, and docs/init.md lists them with their sources.
"""
