"""gunicorn: its worker, its listener, its hooks. Nothing else in Loom imports gunicorn."""
