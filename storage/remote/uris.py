"""What a URI may say: never a secret, because URIs are written into configurations, results and logs."""

import re

# Protocols whose user name is part of the address (a container, a login) and no secret.
_USER_NAMES = ("abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "ftp", "hdfs", "smb")
_SECRETS = re.compile(r"(?<=://)[^/\s]*@|(?<=\?).*")  # what is refused: a user, and a query


def check_uri(uri: str) -> str:
    """Return the URI without a slash at its end; ValueError, which repeats no secret, where it holds credentials."""
    protocol, found, rest = uri.partition("://")
    shown = _SECRETS.sub("...", uri)
    if not found or not rest.strip("/") or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol):
        raise ValueError(f"{shown!r} is no URI of a folder; write for example s3://bucket/folder, without '::'")
    user, has_user, _ = rest.partition("/")[0].rpartition("@")
    if (has_user and (":" in user or protocol not in _USER_NAMES)) or "?" in rest:
        raise ValueError(
            f"{shown} holds credentials or a query, which would be written into configurations and logs; leave "
            "them out and give credentials by environment variables or the machine's role"
        )
    return uri.rstrip("/")
