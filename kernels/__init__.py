"""Array functions in Numba: sampling, planning, gathering, aggregation.

Every kernel takes arrays, writes into arrays that the caller owns and allocates nothing in its loops.
Each has a twin of the same name and signature in `reference_<family>.py`, as obvious as NumPy allows.
Kernels validate nothing: their callers did, once. A kernel that can be split takes a half-open range
`lo, hi` of its outermost loop and holds no lock; `parallel.py` runs the ranges on threads.
Letters in this folder: N nodes, E edges, M ids in a request, F features, H hidden, L layers, B seeds.
"""

from penstock.kernels.cache import ensure_cache

ensure_cache()  # before the first kernel is defined: a decorator asks for the place
