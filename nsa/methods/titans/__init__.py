"""Neural long-term memory (memory.py) beside, before, around or instead of attention; base.py has the table."""
