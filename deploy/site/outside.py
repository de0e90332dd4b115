"""A hook of mkdocs: a link to a file of the tree that is no page becomes the name of the file."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = len(PurePosixPath(page.file.src_uri).parents) - 1
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./){{{depth + 1}}}[^)]*\)", lambda link: f"`{link[1].strip('`')}`", markdown)
