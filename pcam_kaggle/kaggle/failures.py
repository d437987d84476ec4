"""What Kaggle's client raises, as one line that says what to do."""

import re

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import COMPETITION

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
CREDENTIALS = "no valid credentials; put a token from kaggle.com/settings/api into KAGGLE_API_TOKEN or ~/.kaggle/access_token"
NO_KERNEL = "Kaggle shows no such notebook to this account; create it with `make kaggle`"
ACCEPT = f"accept the competition's rules at {RULES}"
LOOK = f"see whether kaggle.com/competitions/{COMPETITION} exists"
SOURCES = "correct the sources in kernel-metadata.json or in --weights"
QUOTA = "wait until the quota is renewed, which `python -m pcam_kaggle kaggle status` tells"
# What requests and urllib3 say of the cause of a failed connection.
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
    # Without an address: those of downloads hold signatures.
    message = re.sub(r" for url: .*$", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    if isinstance(error, HTTPError):
        code = _code(error.response)
        if code == 429 or code >= 500:
            return Unreachable(f"kaggle {action}: {message}; Kaggle cannot answer now, try again later")
        return Refused(f"kaggle {action}: {_with_advice(message, action, code)}")
    if isinstance(error, (RequestException, TransportError)):
        return disconnected(action, str(error))
    return Refused(f"kaggle {action}: {message}")


def _with_advice(message: str, action: str, code: int) -> str:
    """Return `message` with what to do about the status `code`, which depends on the request."""
    if code == 401:
        return CREDENTIALS
    if code in (403, 404) and action in ("status", "log", "fetch"):
        return NO_KERNEL
    advice = {403: ACCEPT, 404: SOURCES if action == "push" else LOOK}
    return f"{message}; {advice[code]}" if code in advice and action != "login" else message


def disconnected(action: str, text: str) -> Unreachable:
    """Return the error for the user if the connection failed in `action`; `text` is what requests says of it."""
    cause = ", ".join(dict.fromkeys(CAUSE.findall(text))) or "it broke off"
    return Unreachable(f"kaggle {action}: no connection to Kaggle: {cause}; check the network and try again")


def refused(action: str, message: str) -> Refused:
    """Return the error for a reply to `action` in which Kaggle says that it refuses it, and why."""
    advice = f"; {QUOTA}" if "quota" in message.lower() else ""
    return Refused(f"kaggle {action}: {' '.join(message.split())}{advice}")


def _code(response: object) -> int:
    """Return the status of a reply; its content may say another one than its header."""
    from requests import Response

    if not isinstance(response, Response):
        return 0
    try:
        content = response.json()
    except ValueError:
        content = None
    code = content.get("code") if isinstance(content, dict) else None
    return code if isinstance(code, int) else response.status_code
