"""Compiled code: Numba functions of arrays and scalars, and the threads that run them.

- ``runtime``: compilation at first use, cached on disk; the pool of threads; ``set_num_threads``.
- ``tables``: distances between points and codewords: the ADC tables of queries, and assignment (encoding).
- ``scan``: the exact top-k scan over blocked codes; ``simd``: the SIMD instructions that make it fast, as LLVM IR.

No function in here checks its arguments: the callers in ``codec`` and ``index`` do.
"""
