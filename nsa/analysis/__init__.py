"""Analysis of finished runs: selectors, swaps, hidden-state sparsity, scaling fits, statistics."""
