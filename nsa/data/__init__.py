"""Data: documents, tokenizers, packing, and batches as pure functions of (seed, step).

    pipeline = data.make(config.data, seed)
    batch = pipeline.batch_at(step)

No iterator exists, so no iterator is saved: the step is the state.
"""
from nsa.data.batches import Batch, Data, make
from nsa.data.sources import Document, check, fingerprint, load, read_ahead
from nsa.data.windows import EvalWindow, eval_windows

__all__ = ["Batch", "Data", "Document", "EvalWindow", "check", "eval_windows", "fingerprint", "load", "make",
           "read_ahead"]
