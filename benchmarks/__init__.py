"""What things cost: `python -m benchmarks.kernels`, `.long`, `.step`, `.decode`, `.memory`, `.tokens`, `.soak`,
`.compile_tpu`; `.tune` writes block shapes, `.support` a table of docs/kernels.md.

cases, peer, models, tpu_programs and timing have what several of these and their tests use (a module with flags
can be imported once in a process), planted writes studies whose answer is known. Imports all other packages; none of
them imports this one.
"""
