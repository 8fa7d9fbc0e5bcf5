"""One recipe in several variants, each a run of its own in a process of its own, and what they measured.

Enters: a recipe and the values to vary. Leaves: `compare/NAME` (a run folder for each variant) and the files of the
comparison.

- variants: every combination of the values, each a recipe with a name and a folder
- compare: each variant trained and scored by the ordinary commands; the report measures them side by side
"""
