"""A run folder to pictures and pages. Reads files only and imports no torch.

Enters: the files of a run, of which some may be missing. Leaves: `report.html` (one file, opens offline),
`results.md`, PNG curves; for a comparison `comparison.json`, `.md`, `.html`, `.png`.

- run_data: what the report knows of a run
- verdict: the results in a few sentences
- tables, plots: scores and figures as text cells, curves as PNG files
- html, page: what the pages share, and the page of a run, with page.css, chart.js and page.js
- markdown: the results as Markdown
- comparison: several runs side by side

Invariant: text that comes from data or models is escaped wherever it is shown.
"""
