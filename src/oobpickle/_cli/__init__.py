"""The command line: what ``python -m oobpickle`` does."""
