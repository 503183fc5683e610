"""What each index can do, found by doing it: the same operations on faiss.IndexPQ, faiss.IndexIVFPQ and both of ours.

    python -m benchmarks.contract [--details] [--json contract.json]

Every cell of the table is a call that was made, on a fresh index of the same 10,000 vectors, in a process of its own kind
(some calls abort the process that makes them, some never return), and whose answer was checked. An operation is one piece
of code that runs on all four; only what differs by design in FAISS itself, the class of search parameters and the name of
the constructor, is told apart (``subjects``). ``operations`` and ``refusals`` list what is tried, ``matrix`` runs it and prints
what came of it.
"""
