"""Snapshots published on threads beside the model, those of a document each as the child of the one before."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.model.placement import HostCopy

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model.state import State
    from rwkv_stream.reading.passes import ChainedChunk
    from rwkv_stream.store import Snapshot
    from rwkv_stream.store.texts import Stretch


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen of the numbers since the start of the text.

    bits    surprise of the tokens that were scored, fp64 []
    tokens  how many that were
    odd     the first token whose hidden state is not finite, int64 []; -1 for none

    Tensors lie where the logits are: to ask for their value is to wait for them.
    """

    bits: Tensor
    tokens: int
    odd: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """A chunk that has been read, or its beginning up to an edge: what a snapshot of this moment would hold; `text`,
    what it adds to the kept text, and its mark in the files that are followed, are there once it is to be published.
    Without `keep_state` its state is left to be made from the text."""

    item: ChainedChunk
    state: State
    last_hidden: Tensor
    exact: bool
    sample: Sample
    text: Stretch | None = None
    mark: Mapping[str, str | int] | None = None
    keep_state: bool = True


class Publisher:
    """One snapshot of a document is under way at a time: when the disk is slower than the model, the model waits, and
    no states pile up."""

    def __init__(
        self,
        publish: Callable[[Position, HostCopy, Snapshot | None], Snapshot],
        last: Snapshot | None,
        threads: Executor,
    ) -> None:
        """`publish` stores a position, once its tensors are there, as the child of the snapshot; `last` is the first
        one's parent."""
        self._publish = publish
        self._last = last
        self._under_way: Future[Snapshot] | None = None
        self._threads = threads

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        return self._under_way is None or self._under_way.done()

    def publish(self, position: Position) -> None:
        """Begin to publish, once what is under way is durable; raises what stopped that one."""
        last = self.wait()
        copy = HostCopy(position.state, position.last_hidden, position.sample.bits, position.sample.odd)
        in_session = contextvars.copy_context().run  # the thread takes part in the store's session
        self._under_way = self._threads.submit(in_session, self._publish, position, copy, last)

    def check(self) -> None:
        """Raise what stopped the one under way, if it has ended; does not wait."""
        if self.is_done:
            self.wait()

    def settle(self) -> None:
        """Wait for what is under way, whatever comes of it."""
        if self._under_way is not None:
            wait([self._under_way])

    def wait(self) -> Snapshot | None:
        """The last one published, once it is durable; raises what stopped it."""
        if self._under_way is not None:
            self._last, self._under_way = self._under_way.result(), None
        return self._last
