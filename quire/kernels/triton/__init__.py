"""GPU kernels in Triton: `<area>/<op>.py`, each with a plain-torch equal of the same name in
quire/kernels/reference. Importing this package imports Triton; only ops.py is used from outside."""
