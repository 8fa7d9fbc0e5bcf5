"""Turns a run folder into a page, Markdown and PNG curves. Only reads files of the run, and imports no torch.

Enters: the files of a run, of which some may be missing (metrics.jsonl, evaluation/results.json and outputs.jsonl,
dataset/ledger.json, ...). Leaves: `report.html` (one file that opens offline), `results.md` and PNG curves of a run;
`comparison.json`, `.md`, `.html` and `.png` of several runs.

The files, in the order in which data flows:

- run_data: reads the files of a run, and selects what the page's scripts draw
- tables: scores and figures as cells of text
- verdict: the results of a run or of a comparison in a few sentences
- plots: curves as PNG files
- html: the frame of a page, and tables in HTML; page.css, chart.js, page.js and comparison.js go into it
- page: the page of a run
- markdown: the results of a run as Markdown
- comparison: measures and compares several runs, and writes their page

Invariants: text that comes from data or models is escaped wherever it is shown; a page loads nothing from anywhere;
too few held-out conversations give neither an interval nor a claim of significance (`minisft.results`).
"""
