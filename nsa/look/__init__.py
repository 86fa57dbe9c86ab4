"""A trained model looked at: what a query selects, block lists kept for kernels, figures, profiles."""
