"""What tells models apart, and what of it is remembered in the user's cache folder; loads no torch.

A fingerprint is made of the digest of the tensors of a checkpoint, which takes long, what they mean, and the tokenizer.
The digest is remembered by path and by size, time of change and inode of all files, with the rest that a fingerprint
takes; where the cache cannot be written, every load computes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from rwkv_stream.files import make_folder, publish
from rwkv_stream.model.config import GROUP_NORM_EPS

SETTLED_NS = 2_000_000_000  # a file changed more recently may change again within one tick of its clock

Stamp = tuple[int, int, int]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a checkpoint what its fingerprint takes, but for the tokenizer.

    identity       size, time of change (ns) and inode of each of its files
    digest         of its tensors
    has_tokenizer  there may be one inside
    """

    identity: tuple[Stamp, ...]
    digest: str
    version: str
    group_norm_eps: float
    vocab_size: int
    has_tokenizer: bool

    def fingerprint(self, tokenizer_id: str) -> str:
        lines = ["rwkv-stream model 1", self.digest, tokenizer_id]
        lines += [f"version {self.version}"] if self.version != "7" else []  # 7 came first
        lines += [f"group_norm_eps {self.group_norm_eps!r}"] if self.group_norm_eps != GROUP_NORM_EPS else []
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def known(path: Path) -> Facts | None:
    """What is remembered of a checkpoint that is one file, and has not changed since."""
    facts = recall(path.absolute())
    return facts if facts is not None and facts.identity == tuple(stamps([path]).values()) else None


def stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """Of each of these files that is there."""
    found = {file: file.stat() for file in files if file.is_file()}
    return {file: (status.st_size, status.st_mtime_ns, status.st_ino) for file, status in found.items()}


def recall(path: Path) -> Facts | None:
    """What is remembered of the checkpoint at an absolute path."""
    match _cache().get(str(path)):
        case {
            "identity": [*identity],
            "digest": str(digest),
            "version": str(version),
            "group_norm_eps": float(eps),
            "vocab_size": int(vocab_size),
            "has_tokenizer": bool(has_tokenizer),
        } if all(isinstance(stamp, list) for stamp in identity):
            return Facts(tuple(map(tuple, identity)), digest, version, eps, vocab_size, has_tokenizer)
    return None


def remember(path: Path, facts: Facts) -> None:
    """Keep it for the next time, unless a file was changed a moment ago."""
    if time.time_ns() - max(changed for _, changed, _ in facts.identity) <= SETTLED_NS:
        return
    cache = _cache_path()
    try:
        make_folder(cache.parent)
        publish(cache, json.dumps({**_cache(), str(path): asdict(facts)}).encode())
    except OSError as error:
        _log.debug("fingerprint not remembered: %s", error)


def _cache_path() -> Path:
    return platformdirs.user_cache_path("rwkv-stream") / "fingerprints.json"


def _cache() -> dict[str, object]:
    """What is remembered: nothing if there is no such file or it is damaged."""
    try:
        found = json.loads(_cache_path().read_bytes())
    except (OSError, ValueError) as error:
        _log.debug("no fingerprints remembered: %s", error)
        return {}
    return found if isinstance(found, dict) else {}
