"""Files that may be gzipped."""

import gzip
import zlib
from pathlib import Path

from ...errors import one_line


def read_unzipped(path: Path) -> bytes:
    """The content of a file, that of a .gz file unzipped.

    Raises:
        ValueError: the file cannot be read, or is a damaged .gz file.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" and not content:
            raise EOFError("it is empty")  # which Python would pass as gzipped nothing
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
