"""What an import or export refuses."""

from __future__ import annotations


class SourceError(Exception):
    """A file that cannot be read or written, or is not what it says. The text is one line."""
