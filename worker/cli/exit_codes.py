"""Exit codes of every command; 0 means done."""

EXIT_FAILED = 1
"""A lost subscription, refused credentials, or requests without an answer."""
EXIT_USAGE = 2
"""Unusable settings or arguments."""
EXIT_INTERRUPTED = 130
"""After Ctrl-C: a shell reports it as 128 and the signal's number."""
