"""A seekable stream over a remote file, which is read by ranges."""

import errno
import io
from collections.abc import Callable


class RangedFile(io.BufferedIOBase):
    """A read-only stream over a file that does not change.

    It buffers the bytes of one range. A read beyond them requests the missing bytes, at least `least_bytes` at once.
    `read_range` and `size` may be used from any thread, everything else from one thread only.
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size: int, least_bytes: int) -> None:
        """Create a stream. `read_range(begin, end)` returns these bytes of the file; both offsets are within it."""
        self.read_range, self.size, self.least_bytes = read_range, size, least_bytes
        self._at = 0
        self.hold(0, b"")

    def hold(self, begin: int, data: bytes) -> None:
        """Replace the buffer with `data`, the bytes of the file from `begin` on."""
        self._begin, self._held = begin, memoryview(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, f"negative seek position {start + offset}")  # like a file on a disk
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self._at + size, self.size)
        if end <= self._at:
            return b""
        held = self._held[self._at - self._begin :] if self._at >= self._begin else self._held[:0]
        missing = self._at + len(held)
        if missing < end:
            more = self.read_range(missing, min(max(end, missing + self.least_bytes), self.size))
            self.hold(self._at, bytes(held) + more)
            held = self._held
        data = bytes(held[: end - self._at])
        self._at += len(data)
        return data
