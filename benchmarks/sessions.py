"""What stands around an engine when it is measured: photos before it, other callers beside it.

All are sessions themselves: `run(batch)` takes what `Candidate.batch` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from litezoo.export.artifact import LoadedArtifact
from litezoo.export.runtime import Array, Session

__all__ = ["PHOTO", "EndToEnd", "Nothing", "Streams"]

#: Height and width of the photos of "end-to-end", about ImageNet's mean.
PHOTO = (375, 500)


class Nothing:
    """A session that does nothing: what it takes is the harness's own."""

    def run(self, batch: Array) -> Array:
        """Return the batch."""
        return batch


class EndToEnd:
    """An engine with its preprocessing: decoded photos (N, H, W, C) uint8 go in, logits come out.

    Resizing, cropping and normalising are those of `litezoo.load`, one photo after another.
    """

    def __init__(self, engine: LoadedArtifact) -> None:
        self.engine = engine

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes)."""
        from PIL import Image

        photos = [Image.fromarray(photo.squeeze()) for photo in batch]
        return self.engine(photos)


class Streams:
    """Callers that run at once, each with a session of its own, as a server's workers do."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = list(sessions)

    def run(self, batch: Array) -> Array:
        """Return the logits of the first caller, when all are done with the batch."""
        with ThreadPoolExecutor(len(self.sessions)) as pool:
            logits = list(pool.map(lambda session: session.run(batch), self.sessions))
        return np.asarray(logits[0])

    def together(self, block: Callable[[Session], list[float]]) -> list[float]:
        """Run a block of every caller at once and return all their times."""
        start = Barrier(len(self.sessions))

        def caller(session: Session) -> list[float]:
            start.wait()
            return block(session)

        with ThreadPoolExecutor(len(self.sessions)) as pool:
            return [time for times in pool.map(caller, self.sessions) for time in times]
