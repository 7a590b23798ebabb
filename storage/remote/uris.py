"""What a URI may say: never a secret, because URIs are written into configurations, results and logs."""

import re

from penstock.storage.redaction import redact_text

# Protocols whose user name is part of the address (a container, a login) and no secret.
_USER_NAMES = ("abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "hdfs", "smb")
_USER = re.compile(r"(://)[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*\?)[^\s'\"]*")


def redacted(text: str) -> str:
    """Remove from a message what may be a secret; of URIs all user information and queries, as libraries quote them."""
    return redact_text(_QUERY.sub(r"\1...", _USER.sub(r"\1...@", text)))


def check_uri(uri: str) -> str:
    """Return the URI without a slash at its end; ValueError, which repeats no secret, where it holds credentials."""
    protocol, found, rest = uri.partition("://")
    if not found or not rest.strip("/") or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol):
        raise ValueError(f"{redacted(uri)!r} is no URI of a folder; write for example s3://bucket/folder, without '::'")
    user, has_user, _ = rest.partition("/")[0].rpartition("@")
    if (has_user and (":" in user or protocol not in _USER_NAMES)) or "?" in rest:
        raise ValueError(
            f"{redacted(uri)} holds credentials or a query, which would be written into configurations and logs; leave "
            "them out and give credentials by environment variables or the machine's role"
        )
    return uri.rstrip("/")
