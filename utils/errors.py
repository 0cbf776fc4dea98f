"""The error a user can mend. The pages turn it into one sentence on stderr and exit code 2."""


class UserError(ValueError):
    """Bad input: a path, a file, a value. The message is one sentence naming file (and line) and the remedy."""
