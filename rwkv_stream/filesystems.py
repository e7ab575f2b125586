"""File systems by URL (s3, gs, sftp, memory, …), of whatever kind `fsspec` opens, and their errors as ours."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any, cast

from rwkv_stream.errors import RwkvStreamError
from rwkv_stream.extras import needed

_MESSAGE_CHARS = 200  # of what a library says
_USER = re.compile(r"(?<=://)[^/@]*@")
_QUERY = re.compile(r"\?.*")


def open_url(url: str, doing: str, kind: type[RwkvStreamError]) -> tuple[Any, str]:
    """The file system of a URL, or of a path, and the path in it.

    doing   for a message: what it is opened for
    raises  `kind` where the URL or what its protocol needs is not known
    """
    with needed("fsspec", "remote", doing, kind):
        from fsspec.core import url_to_fs
    try:
        return cast("tuple[Any, str]", url_to_fs(url))
    except ImportError as error:  # fsspec says which package its protocol needs
        raise kind(f"{doing}: expected what its protocol needs, found: {error}") from error
    except ValueError as error:
        raise kind(f"{doing}: expected a URL that fsspec knows, found: {said(error, url)}") from error


@contextlib.contextmanager
def answered(url: str = "") -> Iterator[None]:
    """Whatever a file system raises, as OSError: each has its own; without what is secret of `url`."""
    try:
        yield
    except RwkvStreamError:  # an interruption
        raise
    except OSError as error:
        kind = type(error) if isinstance(error, FileNotFoundError | FileExistsError | PermissionError) else OSError
        words = without_secrets(error.strerror, url) if error.strerror else said(error, url)
        raise kind(error.errno or errno.EIO, words) from error
    except Exception as error:
        raise OSError(errno.EIO, said(error, url)) from error


def said(error: Exception, url: str = "") -> str:
    """What a library says, on one line, and what kind of error it is; without what is secret of `url`."""
    words = f"{type(error).__name__}: {without_secrets(' '.join(str(error).split()), url)}"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in words)[:_MESSAGE_CHARS]


def shown(url: str) -> str:
    """A URL as a message may have it: without user, password and query."""
    return _QUERY.sub("", _USER.sub("", url))


def without_secrets(message: str, url: str) -> str:
    """A message in which a URL stands as `shown` has it."""
    for secret in (*_USER.findall(url), *(found[1:] for found in _QUERY.findall(url))):
        for part in (secret, *re.split("[:&]", secret.rstrip("@"))):
            if len(part.partition("=")[2] or part) > 2:  # else it is no secret, and stands in many words
                message = message.replace(part, "…")
    return message
