"""Entry points: `python -m launch.train`, `.evaluate`, `.study`, `.report`. Flags live here alone."""
