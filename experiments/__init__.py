"""Experiment files: `get_config(arg)` of some sixty lines whose docstring states question, command, cost and result."""
