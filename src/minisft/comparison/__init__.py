"""Runs one recipe in several variants, each in a run folder and processes of its own, and compares what they measured.

Enters: a recipe, and the strategies or values to vary. Leaves: `compare/NAME` (a run folder for each variant), its log
`compare/NAME.log`, and the files of the comparison: `comparison.json`, `.md`, `.html` and `.png`.

The files, in the order in which data flows:

- variants: makes a recipe with a name and a folder from every combination of the values
- compare: trains and scores each variant by the ordinary commands, and prints the comparison
- `minisft.report.comparison`, outside this folder, measures the run folders and writes the files

Invariants: a variant that fails does not stop the others; a finished variant is not run again unless --force is given;
a folder whose run has other settings is refused, since its figures would be taken for the variant's; data and answers
of an earlier variant are shared as files, and used only if their fingerprints match.
"""
