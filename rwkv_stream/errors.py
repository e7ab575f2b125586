"""The one exception tree: every class carries the exit code that the program ends with.

A message says what was being done, what was expected, what was found, and what to do.
"""


class RwkvStreamError(Exception):
    """Something a user, a file or a machine caused; `exit_code` is what the program ends with."""

    exit_code = 1


class InputError(RwkvStreamError):
    """A source of text that cannot be read."""


class OutputError(RwkvStreamError):
    """A result that cannot be written."""


class CheckpointError(RwkvStreamError):
    """A model file that is not one, is damaged, or holds a model that is not supported."""


class TokenizerError(RwkvStreamError):
    """A tokenizer that is missing, damaged or does not fit its model."""


class BackendError(RwkvStreamError):
    """A device or kernel that was named and cannot be used."""


class UsageError(RwkvStreamError):
    """Arguments that do not make sense, an ambiguous reference among them."""

    exit_code = 2


class PartialFailureError(RwkvStreamError):
    """Some inputs failed; the rest are written."""

    exit_code = 3


class NotFoundError(RwkvStreamError):
    """No such store or snapshot."""

    exit_code = 10


class StoreLockedError(RwkvStreamError):
    """Another process holds the lock that this one needs."""

    exit_code = 11


class SnapshotError(RwkvStreamError):
    """A snapshot, record or reference whose bytes are not what was written."""

    exit_code = 12


class MismatchError(RwkvStreamError):
    """A snapshot or table of another model, or in a newer format than this version reads."""

    exit_code = 13


class StoppedError(RwkvStreamError):
    """SIGINT or SIGTERM stopped what was being done; what is whole has been kept."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
