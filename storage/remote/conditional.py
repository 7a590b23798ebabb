"""Replace small files of S3 only as we know them, by their ETag: a write that lands late fails, whoever made it.

Other file systems do not offer that through fsspec. A server that knows no conditions on writes is written to without.
"""

import errno
from typing import Any


class Changed(OSError):
    """The file is not as this process left it: somebody else has written it."""


class ConditionalWrites:
    """The ETags of files that this process wrote or replaced, by path. One writer per path at a time."""

    def __init__(self, files: Any) -> None:
        self._files = files
        self._known: dict[str, str] = {}  # "" where there was no file
        self._is_offered = True

    def expect(self, path: str) -> str:
        """The ETag of what a write is to replace: of what we wrote last, else of what is there now."""
        if path not in self._known:
            self._known[path] = self._look(path)
        return self._known[path]

    def forget(self, path: str) -> None:
        """Look again before the next write: who makes that knows of the change."""
        self._known.pop(path, None)

    def _look(self, path: str) -> str:
        self._files.invalidate_cache()
        try:
            return str(self._files.info(path).get("ETag", ""))
        except FileNotFoundError:
            return ""

    def write(self, path: str, data: bytes, expected: str) -> None:
        """Write what replaces `expected`; Changed where that is not there any more, and neither is `data`."""
        if not self._is_offered:
            self._files.pipe_file(path, data)
            return
        condition = {"IfMatch": expected} if expected else {"mode": "create"}
        try:
            answer = self._files.pipe_file(path, data, **condition)
        except FileExistsError:
            self._settle(path, data)
        except OSError as error:
            if error.errno == errno.EINVAL and "condition" in str(error).lower():
                self._settle(path, data)
            elif error.errno == errno.ENOSYS:
                self._is_offered = False
                self._files.pipe_file(path, data)
            else:
                raise
        else:
            self._remember(path, answer)

    def _settle(self, path: str, data: bytes) -> None:
        """An earlier try of ours may be what is there. What a late one finds is no news for the next write."""
        etag = self._look(path)
        if not etag or self._files.cat_file(path) != data:
            raise Changed(f"{path} was changed by somebody else meanwhile")
        self._known[path] = etag

    def _remember(self, path: str, answer: Any) -> None:
        etag = answer.get("ETag") if isinstance(answer, dict) else None
        if etag:
            self._known[path] = str(etag)
        else:
            self.forget(path)
