"""The models folder: checkpoints by name, and how they come there from a Hugging Face hub.

    MODELS/name.pth           a checkpoint in one file (.pth, .safetensors, .gguf, .bin), whose tokenizer is World's
    MODELS/name/              a folder in the Hugging Face layout, or one file with the tokenizer.json beside it

A name is that of the file without its suffix, or of the folder. Files that begin with a dot are none of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import platformdirs

from rwkv_stream.errors import CheckpointError, OutputError, RwkvStreamError, UsageError
from rwkv_stream.extras import needed
from rwkv_stream.files import make_folder, resuming

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata

VARIABLE = "RWKV_STREAM_MODELS"
SUFFIXES = (".safetensors", ".pth", ".gguf", ".bin")
PULLED_SUFFIXES = SUFFIXES[:3]  # a .bin of a hub is torch's, and read as part of its folder
TOKENIZER = "tokenizer.json"
TOKENIZERS = (TOKENIZER, "20B_tokenizer.json", "tokenizer_config.json", "rwkv_vocab_v20230424.txt", "vocab.txt")

Progress = Callable[[int, int], None]  # bytes that are here, of all


def folder() -> Path:
    """`RWKV_STREAM_MODELS`, else "models" in the user's data folder; it need not exist."""
    given = os.environ.get(VARIABLE)
    return Path(given).absolute() if given else platformdirs.user_data_path("rwkv-stream") / "models"


def models() -> list[tuple[str, Path]]:
    """Name and path of all that the models folder holds, by name; whether it can be read is not looked at."""
    found: list[tuple[str, Path]] = []
    for path in folder().iterdir() if folder().is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found.append((path.name, _model_in(path)))
        elif path.suffix in SUFFIXES:
            found.append((path.stem, path))
    return sorted(found)


def _model_in(folder: Path) -> Path:
    """The only checkpoint in a folder, else the folder, which may be one in the Hugging Face layout."""
    held = checkpoints(folder)
    return held[0] if len(held) == 1 and not (folder / "config.json").exists() else folder


def checkpoints(folder: Path) -> list[Path]:
    """The files of a folder that look like checkpoints, sorted."""
    return sorted(
        path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file() and path.name[0] != "."
    )


def find(name_or_path: str | Path) -> Path:
    """The checkpoint at a path, else the one of that name, with or without its suffix, in the models folder.

    Raises UsageError for a name that several have, CheckpointError for what is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _model_in(path)
    if os.path.lexists(path) or len(path.parts) > 1:  # a name has no folder
        return path
    name = str(name_or_path)
    known = models()
    matching = [found for known_name, found in known if name in (known_name, found.name)]
    if len(matching) > 1:
        raise UsageError(
            f"finding model '{name}': expected one of that name in '{folder()}', found {_listed(matching)}; "
            "pass one of these paths"
        )
    if not matching:
        names = ", ".join(f"'{known_name}'" for known_name, _ in known) or "none at all"
        raise CheckpointError(
            f"finding model '{name}': expected a path, or a name in the models folder '{folder()}', found neither; "
            f"there are: {names}"
        )
    return matching[0]


def _listed(known: Sequence[Path]) -> str:
    return ", ".join(f"'{path}'" for path in known)


def shipped() -> Path:
    """The model that the package ships."""
    return Path(str(importlib.resources.files("rwkv_stream") / "shipped" / "model.safetensors"))


# ---- from a hub ----


@dataclass(frozen=True, slots=True)
class Pulled:
    """`path` is what `--model` takes; `files` are all that belong to it; `commit` is the revision's."""

    path: Path
    files: tuple[Path, ...]
    commit: str


def pull(repo_id: str, *, revision: str = "main", file: str | None = None, progress: Progress | None = None) -> Pulled:
    """Bring a model from a Hugging Face hub (`HF_ENDPOINT`) into the models folder.

    file    of the repository; has to be said where it holds several models
    raises  CheckpointError where the hub does not give it or gives other bytes than it says, UsageError for a choice
            that is left open, OutputError for files that are there already or cannot be written

    An interrupted download goes on where it was; a file has its name only once its size and checksum, SHA-256 or
    git's, are those that the hub states. (The client's own downloads start anew in another process, and compare the
    size only.)
    """
    with needed("huggingface_hub", "hub", f"pulling '{repo_id}'", CheckpointError):
        import huggingface_hub
    with _hub_errors(repo_id, revision):
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
        commit = str(info.sha)
        names = _chosen(repo_id, [sibling.rfilename for sibling in info.siblings or ()], file)
        urls = [huggingface_hub.hf_hub_url(repo_id, name, revision=commit) for name in names]
        described = [huggingface_hub.get_hf_file_metadata(url) for url in urls]
    stated = [_checksum_and_size(repo_id, name, metadata) for name, metadata in zip(names, described, strict=True)]
    total = sum(size for _, size in stated)
    is_folder = len(names) > 1  # a file and its tokenizer are, too
    name = repo_id.rpartition("/")[2] if file is None else PurePosixPath(file).stem
    home = folder() / name if is_folder else folder()
    targets = [home / PurePosixPath(name).name for name in names]
    before = 0
    try:
        make_folder(home)
        for url, (etag, size), target in zip(urls, stated, targets, strict=True):
            with _hub_errors(repo_id, revision):
                _fetch(url, etag, size, target, _after(before, total, progress))
            before += size
    except BlockingIOError as error:
        raise OutputError(
            f"pulling '{repo_id}': expected to be alone, found another pull of it at work; wait for it"
        ) from error
    except OSError as error:
        raise OutputError(
            f"pulling '{repo_id}' into '{home}': expected to write it, found: {str(error.strerror).lower()}; "
            "run the same command again, it goes on from there"
        ) from error
    return Pulled(home if is_folder else targets[0], tuple(targets), commit)


def _after(before: int, total: int, progress: Progress | None) -> Callable[[int], None]:
    return lambda n: progress(before + n, total) if progress is not None else None


def _chosen(repo_id: str, names: Sequence[str], file: str | None) -> list[str]:
    """The files of a repository that make one model, its weights last. Raises CheckpointError, UsageError."""
    paths = [(name, PurePosixPath(name)) for name in names]
    models = [name for name, path in paths if path.suffix in PULLED_SUFFIXES and path.name[0] != "."]
    if file is not None:
        if file not in models:
            raise UsageError(
                f"pulling '{repo_id}': expected one of its model files ({_brief(models)}), found '{file}'; pass --file"
            )
        beside = str(PurePosixPath(file).with_name(TOKENIZER))
        return [*([beside] if beside in names else []), file]
    parts = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
    weights = [name for name in names if parts.fullmatch(name)]
    if "config.json" in names and weights:
        of_a_kind = [name for name in weights if ".safetensors" in name] or weights
        return [*(name for name in TOKENIZERS if name in names), "config.json", *sorted(of_a_kind)]
    if len(models) == 1:
        return models
    if not models:
        raise CheckpointError(
            f"pulling '{repo_id}': expected {', '.join(PULLED_SUFFIXES)} or a Hugging Face folder, found "
            f"{_brief(names)}; pass a repository that holds a model"
        )
    raise UsageError(f"pulling '{repo_id}': expected one model, found {_brief(models, 50)}; pass one of them as --file")


def _brief(names: Sequence[str], n: int = 10) -> str:
    return (", ".join(names[:n]) or "none") + (f" and {len(names) - n} more" if len(names) > n else "")


def _checksum_and_size(repo_id: str, name: str, metadata: HfFileMetadata) -> tuple[str, int]:
    """What the hub states of a file: its checksum and its size. Raises CheckpointError."""
    if metadata.size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", metadata.etag or ""):
        raise CheckpointError(
            f"pulling '{repo_id}': expected the hub to state size and checksum of '{name}', found "
            f"{metadata.size} and {metadata.etag!r}; download it by hand"
        )
    return str(metadata.etag), metadata.size


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """What the hub's client raises, in our words. Raises CheckpointError."""
    from huggingface_hub import errors

    doing = f"pulling '{repo_id}' at '{revision}'"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{doing}: expected to be let in, found a gated repository; accept its terms on its page and log in "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{doing}: expected a repository, found none (or a private one: log in with `hf auth login`, or HF_TOKEN); "
            "check its name"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{doing}: expected that revision, found none; pass another as --revision") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{doing}: expected OWNER/NAME; {str(error).splitlines()[0]}") from error
    except RwkvStreamError:
        raise
    except Exception as error:  # the client's, or those of its HTTP library, of which there have been several
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, errors.HfHubHTTPError):
            raise  # of the disk
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{doing}: expected the hub's answer, found: {reason}; run the same command again"
        ) from error


def _fetch(url: str, etag: str, size: int, target: Path, report: Callable[[int], None]) -> None:
    """Download one file, going on behind what an earlier try has left. Raises CheckpointError, OutputError, OSError."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils.tqdm import tqdm

    class _Silent(tqdm):
        """The bar is ours."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    if target.exists():
        with target.open("rb") as file:
            if target.stat().st_size != size or _checksum(file, size, etag) != etag:
                raise OutputError(
                    f"pulling to '{target}': expected no such file, or the same, found another; move it away"
                )
        report(size)
        return
    with resuming(target, f"{url} {etag} {size}") as out:
        if out.tell() > size:
            out.truncate(0)
            out.seek(0)
        if out.tell() < size:
            http_get(
                url,
                cast(BinaryIO, _ProgressFile(out, report)),
                resume_size=out.tell(),
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},  # a packed reply cannot be gone on with
                expected_size=size,
                tqdm_class=_Silent,
            )
        out.flush()
        out.seek(0)
        found = _checksum(out, size, etag)
        if found != etag:
            out.truncate(0)
            raise CheckpointError(
                f"pulling '{url}': expected bytes of checksum {etag}, found {found}; run the same command again"
            )
        report(size)


def _checksum(file: IO[bytes], size: int, etag: str) -> str:
    """SHA-256 of a large file, as the hub names it by, or git's SHA-1 of a small one; by the length of `etag`."""
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class _ProgressFile:
    """A file that tells how long it has become."""

    def __init__(self, file: IO[bytes], report: Callable[[int], None]) -> None:
        self._file, self._report = file, report

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._report(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
