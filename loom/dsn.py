"""Connection strings: take out our own parameters, parse them as libpq does, mask passwords."""

from __future__ import annotations

import re

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

_SECRETS = "password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"
_SECRET_PAIR = re.compile(
    rf"""((?:{"|".join(_SECRETS)})["']?\s*[=:]\s*)('(?:\\.|[^'\\])*'?|"(?:\\.|[^"\\])*"?|(?:\\.|\S)+)""",
    re.IGNORECASE | re.DOTALL,
)
_SECRET_URI = re.compile(r"(postgres[a-z0-9+]*://[^\n:]*:)[^\n]*@", re.IGNORECASE)
_SECRET_QUOTE = re.compile(r"(invalid dsn: |percent-encoded (?:token|value): )[^\n]*")


def take_pool(dsn: str) -> tuple[str, dict[str, str]]:
    """Split off the `pool_*` parameters, which libpq refuses, from a URI or a key=value string."""
    pool: dict[str, str] = {}
    uri = re.match(r"(postgres(?:ql)?://(?:[^@/]*@|(?![^@/]*@))[^?]*)\?(.*)", dsn, re.DOTALL)
    if uri:
        parameters = uri[2].split("&")
        pool.update(part.partition("=")[::2] for part in parameters if part.startswith("pool_"))
        rest = "&".join(part for part in parameters if not part.startswith("pool_"))
        return f"{uri[1]}?{rest}" if rest else uri[1], pool

    def take(pair: re.Match[str]) -> str:
        if not pair[1].startswith("pool_"):
            return pair[0]
        pool[pair[1]] = pair[2].strip("'")
        return ""

    if re.match(r"postgres(ql)?://", dsn):
        return dsn, pool
    return re.sub(r"([^\s=]+)\s*=\s*('(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)\s*", take, dsn, flags=re.DOTALL), pool


def parse(dsn: str) -> dict[str, str]:
    """Parse a DSN as libpq does. Raises ValueError, whose text contains no part of the DSN."""
    try:
        parameters = parse_dsn(dsn)
    except psycopg2.ProgrammingError as exc:
        problem = re.sub(r'"(?!=").*"', "...", str(exc).removeprefix("invalid dsn: "), flags=re.DOTALL)
        raise ValueError(f"libpq refuses it: {problem.strip()}") from None
    except ValueError:
        raise ValueError("libpq refuses it: not text in UTF-8") from None
    # If a password contains a raw @ or /, libpq reads the rest of it as a host, a port or a database.
    places = parameters.get("host", "") + (parameters.get("dbname", "") if "://" in dsn[:13] else "")
    if "@" in places or not re.fullmatch(r"[0-9,]*", parameters.get("port", "")):
        raise ValueError("a password's special characters need percent-encoding in a URI (@ is %40, / is %2F)")
    return parameters


def mask(text: str) -> str:
    """Return a DSN, or any text that may contain one, with *** in place of each password.

    A valid DSN is returned as key=value with the other values unchanged. In other text, where the end of a password
    is unknown, more than the password may be replaced.
    """
    if "=" not in text and ":" not in text:
        return text
    try:
        if re.search(r"://.*\s", text):
            raise ValueError("a sentence that begins with a URI")
        return make_dsn(**{name: "***" if name in _SECRETS else value for name, value in parse(text).items()})
    except ValueError:
        for pattern in _SECRET_URI, _SECRET_PAIR, _SECRET_QUOTE:
            text = pattern.sub(lambda match: match[1] + "***" + ("@" if match[0].endswith("@") else ""), text)
        return text
