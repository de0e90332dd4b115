"""Connection strings: take out our own parameters, parse them as libpq does, mask passwords."""

from __future__ import annotations

import difflib
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


# What libpq passes on of a server's refusal has no SQLSTATE; so this is known only from English texts.
_REFUSALS = {
    r"password authentication failed|SASL authentication failed": "the role or its password is wrong",
    r"no password supplied": "the password is missing",
    r'role "[^\n]*" does not exist|no such user': "there is no such role",
    r'database "[^\n]*" does not exist|no such database': "there is no such database",
    r"no pg_hba.conf entry": "pg_hba.conf of the server admits no such connection",
}


def connect_problem(text: str) -> str:
    """What libpq says of a connection that failed, on one line without passwords; first, what in the DSN is wrong."""
    said = mask("; ".join(line.strip() for line in text.splitlines() if line.strip()))
    for pattern, problem in _REFUSALS.items():
        if re.search(pattern, said):
            return f"database.dsn: {problem}: {said}"
    return said


_NUMBERS = {"port", "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"}
_NUMBERS |= {"tcp_user_timeout"}
_PARAMETERS = {"host", "hostaddr", "dbname", "user", "passfile", "client_encoding", "options", "application_name"}
_PARAMETERS |= {
    "sslmode",
    "sslcert",
    "sslkey",
    "sslrootcert",
    "sslcrl",
    "gssencmode",
    "channel_binding",
    "require_auth",
}
_PARAMETERS |= {"target_session_attrs", "load_balance_hosts", "service", "password", *_NUMBERS}


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
    """Parse a DSN as libpq does. Raises ValueError, which names the part that is wrong and shows no password."""
    try:
        parameters = parse_dsn(dsn)
    except psycopg2.ProgrammingError as exc:
        raise ValueError(_syntax_problem(dsn, str(exc).removeprefix("invalid dsn: ").strip())) from None
    except ValueError:
        raise ValueError("libpq refuses it: not text in UTF-8") from None
    # If a password contains a raw @ or /, libpq reads the rest of it as a host, a port or a database.
    places = parameters.get("host", "") + (parameters.get("dbname", "") if "://" in dsn[:13] else "")
    if "@" in places:
        raise ValueError("a password's special characters need percent-encoding in a URI (@ is %40, / is %2F)")
    for name in _NUMBERS & parameters.keys():
        if not re.fullmatch(r"[-0-9, ]*", parameters[name]):
            raise ValueError(f"{name}: expected a whole number")
    return parameters


def check(dsn: str) -> None:
    """Raise ValueError, with the name of the part that is wrong, for a DSN or a value in it that libpq refuses."""
    parameters = parse(dsn)
    hosts = max(parameters.pop(name, "").count(",") for name in ("host", "hostaddr")) + 1
    # libpq checks a value when it connects; on the way to this socket, which does not exist, it checks all of them.
    nowhere = {"host": ",".join(["/nonexistent"] * hosts), "hostaddr": ""}  # "": not PGHOSTADDR

    def refusal(**given: str) -> str:
        try:
            psycopg2.connect(make_dsn(**nowhere, **given))
        except psycopg2.OperationalError as exc:
            return "" if "/nonexistent" in str(exc) else mask(str(exc).strip())
        return ""

    if problem := refusal(**parameters):
        wrong = [name for name, value in parameters.items() if refusal(**{name: value})]
        raise ValueError(f"{wrong[0]}: libpq refuses its value" if wrong else f"libpq refuses it: {problem}")


def _syntax_problem(dsn: str, said: str) -> str:
    """What is wrong with a DSN, in which part. `said`: libpq's text, which may quote a password."""
    uri = re.match(r"postgres(?:ql)?://", dsn)
    scheme = re.match(r"([a-z][a-z0-9+.-]*):/", dsn, re.IGNORECASE)
    if scheme and not uri:
        return f"{scheme[1]}: expected postgresql://..., or pairs of key=value"
    text = dsn.partition("?")[2] if uri else dsn
    quoted = re.search(r'(?:after |option |parameter: )"([a-z_]+)"', said)
    before = text.partition(quoted[1])[0] if quoted else ""
    # A password that is not quoted, or not percent-encoded, is cut into pieces, and this may be one of them.
    if quoted and not (uri and "@" in text) and not any(secret in before for secret in _SECRETS):
        if "separator" in said or "missing" in said:
            return f"{quoted[1]}: expected {quoted[1]}=value"
        near = difflib.get_close_matches(quoted[1], _PARAMETERS, 1, 0)[0]
        return f"unknown parameter {quoted[1]}, the nearest valid one is {near}"
    if "percent-encoded" in said:
        user, _, password = dsn.partition("//")[2].rpartition("@")[0].partition(":")
        parts = {"user": user, "password": password}
        wrong = [name for name, part in parts.items() if re.search(r"%(?![0-9a-fA-F]{2})|%00", part)]
        return f"{' and '.join(wrong) or 'host, dbname or a parameter'}: a % that stands for itself is written %25"
    if "IPv6" in said or "unexpected character" in said:
        return "host: expected an IPv6 address in [ ], then a port or a path"
    if "unterminated" in said:
        return "a value begins with a single quote that is not closed"
    return (
        "the password, or what follows it: special characters need percent-encoding in a URI (@ is %40), "
        "and in pairs of key=value, a value with spaces needs single quotes"
    )


def may_hold_secret(text: str) -> bool:
    """Whether `mask` could find something to mask in a part of the text. Quick, for the log line of a request."""
    low = text.lower()
    words = "postgres" in low or "password" in low or "secret" in low or "scram_" in low
    return words or "invalid dsn" in low or "percent-encoded" in low


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
