"""What Kaggle's client raises, as one line that says what to do."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.paths import COMPETITION

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
CREDENTIALS = "not logged in; run `kaggle auth login`, or put a token into KAGGLE_API_TOKEN or ~/.kaggle/access_token"
NO_KERNEL = "Kaggle shows no such notebook to this account; create it with `make kaggle`"
ACCEPT = f"accept the competition's rules at {RULES}"
LOOK = f"see whether kaggle.com/competitions/{COMPETITION} exists"
SOURCES = "correct the sources in kernel-metadata.json or in --weights"
ADVICE = {
    "quota": f"wait until the quota is renewed, which `{program()} kaggle status` tells",
    "session count": "wait until one of your other sessions ends, or stop one on kaggle.com",
}
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


@contextlib.contextmanager
def asking(action: str) -> Iterator[None]:
    """Turn what Kaggle's client raises in `action` (`push`, `status`, …) into one line for the user."""
    from requests import HTTPError, RequestException
    from urllib3.exceptions import HTTPError as TransportError

    try:
        yield
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        reason = f"the client can't read Kaggle's reply ({type(error).__name__}: {error})"
        raise UserError(f"kaggle {action}: {reason}; update it with pip install -U kaggle") from None
    except HTTPError as error:
        raise _answered(action, error) from None
    except (RequestException, TransportError) as error:
        raise disconnected(action, str(error)) from None
    except ValueError as error:
        # The client replaces a refusal to show a kernel by a guess at its cause.
        if isinstance(error.__context__, HTTPError):
            raise _answered(action, error.__context__) from None
        raise Refused(f"kaggle {action}: {' '.join(str(error).split())}") from None


def _answered(action: str, error: Any) -> UserError:
    """Return what to tell the user if `error` of requests is Kaggle's answer to `action`."""
    code = error.response.status_code if error.response is not None else 0
    # Without an address: those of downloads hold signatures.
    message = re.sub(r" for url: .*$", "", " ".join(str(error).split()))
    if code == 429 or code >= 500:
        return Unreachable(f"kaggle {action}: {message}; Kaggle cannot answer now, try again later")
    if code == 401:
        message = CREDENTIALS
    elif code in (403, 404) and action in ("status", "log", "fetch"):
        message = NO_KERNEL
    elif code in (403, 404) and action != "login":
        not_found = SOURCES if action == "push" else LOOK
        message += f"; {ACCEPT if code == 403 else not_found}"
    return Refused(f"kaggle {action}: {message}")


def disconnected(action: str, text: str) -> Unreachable:
    """Return what to tell the user if the connection failed in `action`; `text` is what requests says of it."""
    cause = ", ".join(dict.fromkeys(CAUSE.findall(text))) or "it broke off"
    return Unreachable(f"kaggle {action}: no connection to Kaggle: {cause}; check the network and try again")


def refused(action: str, message: str) -> Refused:
    """Return what to tell the user if Kaggle's reply to `action` is a refusal with the reason `message`."""
    advice = "".join(f"; {advice}" for reason, advice in ADVICE.items() if reason in message.lower())
    return Refused(f"kaggle {action}: {' '.join(message.split())}{advice}")
