"""What gunicorn loads: `gunicorn app:app` (its settings: gunicorn.conf.py)."""

from loom.routes import create_app

app = create_app()
