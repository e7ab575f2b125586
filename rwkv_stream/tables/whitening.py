"""Whitening: embeddings moved and scaled so that a corpus spreads evenly in all directions.

Hidden states of language models share a few strong directions that say little about a text (Mu and Viswanath 2018,
"All-but-the-Top"; Su et al. 2021, arXiv 2103.15316). With the mean m and the covariance V diag(l) Vᵀ of a corpus,

    x → (x - m) V diag(1 / sqrt(l + SHRINKAGE · mean(l))) Vᵀ,        then to length 1

where SHRINKAGE keeps directions in which a small corpus hardly varies from being blown up. Fitted in one pass in fp64,
at a memory of D² numbers, and kept as a safetensors file, so that it can be applied to other texts and to queries.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.files import publish
from rwkv_stream.tables.columns import embedding

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    from rwkv_stream.tables.columns import Float32s

SUFFIX = ".whitening.safetensors"
FORMAT = "1"
SHRINKAGE = 0.1
TABLE_ROWS = 1024  # that are summed at a time
BLOCK_ROWS = 64  # a product has always so many rows: what becomes of a row knows nothing of the others


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """mean [D] and matrix [D, D] in fp64, of `rows` vectors that `model` (a fingerprint) made with `pooling`."""

    mean: npt.NDArray[np.float64]
    matrix: npt.NDArray[np.float64]
    rows: int
    model: str
    pooling: str

    @classmethod
    def fit(cls, batches: Iterable[Float32s], *, model: str, pooling: str) -> Whitening:
        """From vectors [n, D], batch by batch. Raises UsageError for fewer than two."""
        n, total, products = 0, np.zeros(()), np.zeros(())
        for batch in batches:
            x = batch.astype(np.float64)
            n, total, products = n + len(x), total + x.sum(0), products + x.T @ x
        if n < 2:
            raise UsageError(f"whitening: expected 2 vectors or more, found {n}")
        mean = total / n
        variances, directions = np.linalg.eigh(products / n - np.outer(mean, mean))
        scale = 1 / np.sqrt(variances.clip(min=0) + SHRINKAGE * variances.mean())
        return cls(mean, (directions * scale) @ directions.T, n, model, pooling)

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        return hashlib.sha256(self.mean.tobytes() + self.matrix.tobytes()).hexdigest()

    @property
    def suffix(self) -> str:
        return SUFFIX

    @property
    def metadata(self) -> dict[str, str]:
        """Of a table that it was applied to."""
        return {"whitening": self.digest}

    def apply_to_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows with their vectors whitened, as if `rows` had been given it."""
        import pyarrow as pa

        vectors = self.apply(embedding(batch))
        at = batch.schema.get_field_index("embedding")
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        return batch.set_column(at, batch.schema.field(at), column.cast(batch.schema.field(at).type))

    def apply(self, vectors: Float32s) -> Float32s:
        """Whitened vectors of length 1, [n, D]."""
        matrix = torch.from_numpy(self.matrix)
        whitened = np.zeros(vectors.shape)
        for at in range(0, len(vectors), BLOCK_ROWS):
            block = torch.zeros(BLOCK_ROWS, len(matrix), dtype=matrix.dtype)
            n = len(vectors[at : at + BLOCK_ROWS])
            block[:n] = torch.from_numpy(vectors[at : at + n] - self.mean)
            whitened[at : at + n] = (block @ matrix)[:n].numpy()
        return unit_length(whitened)

    def save(self, path: str | Path) -> None:
        """Publish it as a file, whole or not at all."""
        from safetensors.numpy import save

        metadata = {"format": FORMAT, "model": self.model, "pooling": self.pooling, "rows": str(self.rows)}
        publish(Path(path), save({"mean": self.mean, "matrix": self.matrix}, metadata), kind="table")

    @classmethod
    def load(cls, path: str | Path) -> Whitening:
        """Raises InputError for a file that is none, MismatchError for a newer format."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format", FORMAT) != FORMAT:
                    raise MismatchError(
                        f"loading whitening '{path}': expected format {FORMAT}, found {metadata['format']}; "
                        "update rwkv-stream"
                    )
                mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
            rows, model, pooling = int(metadata["rows"]), metadata["model"], metadata["pooling"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"loading whitening '{path}': expected a file that `save` made, found: {error}") from error
        if mean.ndim != 1 or matrix.shape != (len(mean), len(mean)):
            raise InputError(f"loading whitening '{path}': expected [D] and [D, D], found {mean.shape}, {matrix.shape}")
        return cls(mean, matrix, rows, model, pooling)


def unit_length(vectors: npt.NDArray[np.float64]) -> Float32s:
    """Float32s [n, D] divided by their lengths, fp32; a vector of zeros stays one."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    scaled: Float32s = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled


# ---- tables ----


def fit_tables(tables: Sequence[Path], *, model: str, pooling: str) -> Whitening:
    """The whitening of the vectors of Parquet files, summed in their order, whatever files these are dealt to. Raises
    UsageError for fewer than two."""
    return Whitening.fit(_blocks(map(_vectors, tables)), model=model, pooling=pooling)


def _vectors(table: Path) -> Iterator[Float32s]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(TABLE_ROWS, columns=["embedding"]):
            yield embedding(batch)


def _blocks(tables: Iterable[Iterator[Float32s]]) -> Iterator[Float32s]:
    """All vectors, TABLE_ROWS at a time but for the last ones: sums depend on what is summed together."""
    held: list[Float32s] = []
    for vectors in itertools.chain.from_iterable(tables):
        while sum(map(len, held)) + len(vectors) >= TABLE_ROWS:
            n = TABLE_ROWS - sum(map(len, held))
            yield np.concatenate([*held, vectors[:n]])
            held, vectors = [], vectors[n:]
        held.append(vectors)
    if any(map(len, held)):
        yield np.concatenate(held)
