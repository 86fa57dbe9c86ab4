"""What things cost: `python -m benchmarks.kernels`, `.long`, `.step`, `.decode`, `.overhead`, `.soak`, `.compile_tpu`;
`.tune` writes block shapes.

Imports all other packages; none of them imports this one.
"""
