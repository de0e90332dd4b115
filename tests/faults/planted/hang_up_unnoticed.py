"""Nobody looks whether a waiting client has hung up: its request goes on waiting, and is granted the lock."""

from __future__ import annotations

from app import app as app
from loom.routes import locks

locks.gone = lambda: lambda: False
