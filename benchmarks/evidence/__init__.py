"""The evidence study: which method wins, when, and why. PROTOCOL.md says how; `python benchmarks/evidence.py` runs it.

grid.py      every cell, in the order in which it counts; methods are rows of one table
cells.py     one cell: a run of `dfl train`, its test evaluation, and what is kept of it
runner.py    several cells at a time, within a budget, resumable
findings.py  rates, pairs, differences, verdicts
page.py      the page and the tables of the documents
tables.py     results, verdicts and what is missing, as text, also in documents
page.py       the page
packed.py, recorder.py, balanced.py   plug-ins of the runs
"""
