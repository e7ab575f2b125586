"""The columns of a table of embeddings, and the vectors in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    Columns = Mapping[str, pa.DataType]
    Float32s = npt.NDArray[np.float32]

FORMAT = "1"  # of a table's metadata
_SPANS = ("byte_start", "byte_end", "token_start", "token_end")
UNIT_COLUMNS = ("document", "unit", "index", "text", "excerpt", *_SPANS)


def schema(dimension: int, columns: Columns | None = None) -> pa.Schema:
    """The columns of a table of rows, and the further ones."""
    import pyarrow as pa

    words = {"document", "unit", "text", "excerpt"}
    units = [(name, pa.string() if name in words else pa.int64()) for name in UNIT_COLUMNS]
    return pa.schema([*units, ("embedding", pa.list_(pa.float32(), dimension)), *(columns or {}).items()])


def citations() -> Columns:
    """The further columns of every file: what a person would cite."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    return {"id": text, "page": number, "chapter": text, "line": number, "row": number}


def embedding(batch: pa.RecordBatch | pa.Table) -> Float32s:
    """The vectors [n, D] of rows."""
    column = batch.column("embedding")
    parts = getattr(column, "chunks", [column])
    flat = [part.flatten().to_numpy() for part in parts]
    return np.concatenate(flat).reshape(batch.num_rows, column.type.list_size)
