"""Mixed precision: each layer gets the setting that keeps the whole model nearest to the original at a given size.

asked.py, candidates.py, measure.py (with forks.py, store.py), allocate.py, in this order; run.py is the whole flow.
"""
