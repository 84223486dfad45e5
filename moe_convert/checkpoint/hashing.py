"""SHA-256 of files, while they are written or afterwards."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from pathlib import Path

BLOCK_BYTES = 1 << 20
"""Small enough to stay in a core's cache between reading and hashing."""


class Hasher:
    """Hashes files from their start as far as they are written, in threads of its own.

    A hash takes one byte after the other, so only several files can keep several cores busy.
    """

    def __init__(self, paths: list[Path]) -> None:
        """Begin to wait for the first bytes."""
        self._allowed = [0] * len(paths)
        self._changed, self._stopped = threading.Condition(), False
        self._hashes: dict[str, str] = {}
        self._error: OSError | None = None
        self._waiting = queue.SimpleQueue[tuple[int, Path]]()
        for number, path in enumerate(paths):
            self._waiting.put((number, path))
        count = min(len(paths), os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def allow(self, number: int, num_bytes: int) -> None:
        """Say that a file is final up to this byte."""
        with self._changed:
            self._allowed[number] = max(self._allowed[number], num_bytes)
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up what is not hashed yet."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def result(self) -> dict[str, str]:
        """Wait for the last byte and return file name to SHA-256."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._hashes

    def _run(self) -> None:
        try:
            while True:
                number, path = self._waiting.get_nowait()
                digest = self._hash(number, path)
                if digest is None:
                    return
                self._hashes[path.name] = digest
        except queue.Empty:
            return
        except OSError as error:
            self._error = error

    def _wait(self, number: int, position: int) -> int | None:
        """Return up to which byte a file is final, once that is more than `position`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._allowed[number] > position)
            return None if self._stopped else self._allowed[number]

    def _hash(self, number: int, path: Path) -> str | None:
        digest, position, size_bytes = hashlib.sha256(), 0, path.stat().st_size
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            while position < size_bytes:
                allowed = self._wait(number, position)
                if allowed is None:
                    return None
                count = file.readinto(buffer[: allowed - position])
                digest.update(buffer[:count])
                position += count
        return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
