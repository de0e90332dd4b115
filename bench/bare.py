"""The framework's limit: Flask routes that run only Loom's statements."""

from __future__ import annotations

import os
import threading

import psycopg2
from flask import Flask

app = Flask(__name__)
_local = threading.local()


def _one(sql: str, *params: object) -> tuple:
    if not hasattr(_local, "conn"):
        _local.conn = psycopg2.connect(os.environ["DATABASE_DSN"])
        _local.conn.autocommit = True
    with _local.conn.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()


@app.post("/api/v1/locks/<name>")
def acquire(name: str) -> tuple[dict, int]:
    row = _one("SELECT * FROM acquire_lock(%s, %s, NULL, '30 s', NULL, false)", name, "bench")
    return {"fencing_token": row[5], "expires_at": str(row[7])}, 201


@app.delete("/api/v1/locks/<name>/<int:token>")
def release(name: str, token: int) -> tuple[str, int]:
    _one("SELECT release_lock(%s, %s, 'released', NULL)", name, token)
    return "", 204
