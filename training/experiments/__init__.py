"""The paper's experiments as commands: ``hihpq table`` (Tables 1 and 2) and ``hihpq sweep`` (Figure 4, Table 3).

setting.py    what all runs of an experiment share: protocol, features, views, evaluation
runs.py       one run is (method, bits, seed) in a folder of its own; finished ones are kept, started ones go on
tables.py     the grid of a table, and its CSV, Markdown and terminal forms
sweeps.py     a hyper-parameter's effect: which runs, and the picture
baselines.py  exact search, PQ and OPQ by faiss
published.py  the paper's own figures
cli.py        the two commands
"""
