"""The package's own errors: each message is one sentence with the value, the limit and the remedy."""

LONGEST = 600
"""Characters of a message."""


class SinkCircuitsError(ValueError):
    """Base of all errors that a user's input can cause; the command line prints it alone and exits with 2.

    The message is one line whatever stands in it (names of files, other packages' errors), at most `LONGEST` characters (its middle
    is left out first), and cannot steer a terminal.
    """

    def __init__(self, message: object = ""):
        line = " ".join(str(message).split())
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[5 - LONGEST // 2 :]}")


class ModelError(SinkCircuitsError):
    """A model that cannot be loaded, or whose hooks do not mean what the method needs."""


class InputError(SinkCircuitsError):
    """Tokens, positions, layers, factors or thresholds out of range."""


class CacheError(SinkCircuitsError):
    """A user's `clean_cache` lacks hooks, or belongs to another text."""


class ResultError(SinkCircuitsError):
    """A result file that cannot be written or read."""


class WeightsError(SinkCircuitsError):
    """Weights that could not be fetched, converted or written."""
