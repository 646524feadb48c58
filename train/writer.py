"""Checkpoints written in the background, while training goes on."""

import threading
from collections.abc import Callable

from train.checkpoint import Shelf, Snapshot, write


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; its ranks agree in a group of their own.

    Args:
        shelf: Where checkpoints go; its group must be used by nothing else.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written; the error is raised by `wait`."""
        return self._error is not None

    def start(self, snapshot: Snapshot, *, after: Callable[[], None]) -> None:
        """Write `snapshot` as soon as the one before is written.

        Args:
            snapshot: Of this rank.
            after: As in `write`.

        Raises:
            CheckpointError: If the one before could not be written; nothing more is then.
        """
        self.wait()
        # A thread that cannot end, as another rank is gone, must not keep the process alive.
        self._thread = threading.Thread(target=self._write, args=(snapshot, after), daemon=True)
        self._thread.start()

    def join(self, seconds: float | None = None) -> None:
        """Return when nothing is being written any more, or after some seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: If the last checkpoint could not be written.
            BaseException: Whatever else has ended the thread.
        """
        self.join()
        if self._error is not None:
            raise self._error

    def _write(self, snapshot: Snapshot, after: Callable[[], None]) -> None:
        try:
            write(snapshot, self.shelf, after=after)
        except BaseException as error:  # noqa: BLE001  `wait` raises it in the main thread
            self._error = error
