"""What gunicorn loads: `gunicorn app:app` (its settings: gunicorn.conf.py)."""

from loom.http import create_app

app = create_app()
