"""What a kernel cannot be faster than: its work against a chip's published peaks. No device is touched.

`predict("compressed_attention", spec, CHIPS["v5p"])` counts, for the tiles that the kernels really use, the
products on the matrix unit, the bytes over HBM, the copies, the grid steps and what lies on chip, and divides
by data-sheet peaks. A prediction is a bound, not a forecast: it leaves out latency, what the compiler cannot
overlap, caches other than one pass over what fits them, and everything XLA does around the kernels except
the copies named here.

How far that is from the clock, where one was looked at: see `tests/cost_test.py`.
"""
from pallas_kernels.cost.chips import CHIPS, Chip, Kernel, Prediction
from pallas_kernels.cost.predict import OPERATIONS, predict

__all__ = ("CHIPS", "Chip", "Kernel", "OPERATIONS", "Prediction", "predict")
