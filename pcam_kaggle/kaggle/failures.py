"""What Kaggle's client raises, as one line that says what to do."""

import re
from typing import TYPE_CHECKING

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import COMPETITION

if TYPE_CHECKING:
    from requests import HTTPError

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
CREDENTIALS = "no valid credentials; put a token from kaggle.com/settings/api into KAGGLE_API_TOKEN or ~/.kaggle/access_token"
ACCEPT = f"{{message}}; accept the competition's rules at {RULES}"
LOOK = f"{{message}}; see whether kaggle.com/competitions/{COMPETITION} exists"
NO_KERNEL = "Kaggle shows no such kernel to this account; create it with make kernel-push"
SOURCES = "{message}; correct the sources in kernel-metadata.json or in --weights"
QUOTA = "{message}; wait until the quota is renewed, which `python -m pcam_kaggle kaggle check` tells"
LATER = "{message}; Kaggle cannot answer now, try again later"
# What a status means depends on the request.
OF_COMPETITION = {401: CREDENTIALS, 403: ACCEPT, 404: LOOK}
OF_KERNEL = {401: CREDENTIALS, 403: NO_KERNEL, 404: NO_KERNEL}
ADVICE = {
    "login": {401: CREDENTIALS},
    "push": {401: CREDENTIALS, 403: ACCEPT, 404: SOURCES},
    "status": OF_KERNEL,
    "logs": OF_KERNEL,
    "output": OF_KERNEL,
}
# How requests and urllib3 name the cause of a failed connection.
CAUSE = re.compile(
    r"\w+ connect to proxy|Proxy Authentication Required|Tunnel connection failed: [\w ]+|Failed to resolve '[^']*'"
    r"|\[Errno -?\d+\] [\w ]*\w|timed out|Connection reset by peer|Remote end closed connection|CERTIFICATE_VERIFY_FAILED"
    r"|Response ended prematurely|IncompleteRead"
)


class Unreachable(UserError):
    """Kaggle can't be reached or can't answer now, so that the same request may succeed later."""


class Refused(UserError):
    """Kaggle has refused a request, or the client has not sent it, so that it has had no effect."""


def explained(error: Exception, action: str) -> UserError:
    """Return the error for the user if `action` (`push`, `status`, …) has raised `error` in Kaggle's client."""
    # requests is only installed where the client is.
    from requests import HTTPError, RequestException
    from urllib3.exceptions import HTTPError as TransportError

    # The client replaces a refusal to show a kernel by a ValueError with a guess at its cause.
    if not isinstance(error, (RequestException, TransportError)) and isinstance(error.__context__, HTTPError):
        error = error.__context__
    message = _first_line(error)
    if isinstance(error, HTTPError):
        code = _code(error)
        if code == 429 or code >= 500:
            return Unreachable(f"kaggle {action}: {LATER.format(message=message)}")
        advice = ADVICE.get(action, OF_COMPETITION).get(code, "{message}")
        return Refused(f"kaggle {action}: {advice.format(message=message)}")
    if isinstance(error, (RequestException, TransportError)):
        return disconnected(action, str(error))
    return Refused(f"kaggle {action}: {message}")


def disconnected(action: str, text: str) -> Unreachable:
    """Return the error for the user if the connection failed in `action`; `text` is what requests says of it."""
    cause = ", ".join(dict.fromkeys(CAUSE.findall(text))) or "it broke off"
    return Unreachable(f"kaggle {action}: no connection to Kaggle: {cause}; check the network and try again")


def refused(action: str, message: str) -> Refused:
    """Return the error for a reply to `action` in which Kaggle says that it refuses it, and why."""
    advice = QUOTA if "quota" in message.lower() else "{message}"
    return Refused(f"kaggle {action}: {advice.format(message=' '.join(message.split()))}")


def _code(error: "HTTPError") -> int:
    """Return the status of a reply; its content may say another one than its header."""
    if error.response is None:
        return 0
    try:
        content = error.response.json()
    except ValueError:
        content = {}
    code = content.get("code") if isinstance(content, dict) else None
    return code if isinstance(code, int) else error.response.status_code


def _first_line(error: Exception) -> str:
    """Return the first line of the message of `error`, without an address: those of downloads hold signatures."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r" for url: .*$", "", lines[0])
