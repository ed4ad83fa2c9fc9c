"""Whether a download has a chance, found out in seconds: TFDS itself would retry for minutes."""

import socket
import urllib.parse
import urllib.request

_PORTS = {"http": 80, "https": 443, "ftp": 21}


def unreachable(url: str, timeout: float = 10.0) -> str | None:
    """Say why the host of ``url`` cannot be reached.

    Args:
      url: what is to be downloaded; only its host is asked, and only for a connection.
      timeout: seconds.

    Returns:
      The reason, or None if a connection can be made or a proxy stands between, whose business it is.

    Example:
      >>> unreachable("http://localhost:1/file").split(" (")[0]
      'there is no connection to localhost'
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _PORTS or parts.scheme in urllib.request.getproxies():
        return None
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout).close()
    except OSError as error:
        return f"there is no connection to {parts.hostname} ({error.strerror or error})"
    return None
