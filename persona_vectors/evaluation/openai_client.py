"""Requests to any OpenAI-compatible server that survive real life: retries, Retry-After, timeouts."""

import json
import os
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from persona_vectors.data.errors import InputError

BACKOFF = 0.5
"""Seconds before the first repetition; each later one waits twice as long, up to LONGEST."""
LONGEST = 30.0
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
T = TypeVar("T")


class Malformed(Exception):
    """A reply that came, and was not what the protocol says."""


class Refused(Exception):
    """The server will not answer this request (400, 413, 422), and might answer others."""


def connect(base_url: str | None, *, timeout: float) -> Any:
    """Return an openai client with no retries of its own; the key comes from OPENAI_API_KEY alone.

    Raises InputError where the package, the key or a usable address is missing.
    """
    try:
        from openai import OpenAI
    except ImportError:
        raise InputError("this needs the openai package: pip install 'persona-vectors-toolkit[openai]'") from None
    address = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"base URL {address!r} is no address: give one such as http://127.0.0.1:8000/v1")
    if not os.environ.get("OPENAI_API_KEY"):
        raise InputError("OPENAI_API_KEY is not set: export your key (any text for a local server)")
    return OpenAI(base_url=address, max_retries=0, timeout=timeout)


def ask(
    client: Any,
    request: dict[str, Any],
    read: Callable[[dict[str, Any]], T],
    *,
    attempts: int,
    on_retry: Callable[[], object] = lambda: None,
    stopped: threading.Event | None = None,
) -> T:
    """Send a request until `read` accepts its reply, at most `attempts` times; return what `read` made of it.

    One with "messages" goes to the chat, and one with a "prompt" to be completed.

    Passing faults are repeated: no connection, a timeout, 408, 409, 429, 5xx, and replies that are no JSON or that
    `read` calls `Malformed`. A Retry-After is respected, and else the wait doubles, with jitter. `stopped` ends the
    repeating, and the wait for it, at once.

    Raises Refused for what is wrong with this one request, and InputError for faults that repeating cannot mend, and
    where every attempt failed.
    """
    from openai import APIConnectionError, APIStatusError, OpenAIError

    where, stopped = f"the server at {client.base_url}", stopped or threading.Event()
    path = "/chat/completions" if "messages" in request else "/completions"
    for attempt in range(1, attempts + 1):
        wait = random.uniform(0.5, 1) * min(LONGEST, BACKOFF * 2 ** (attempt - 1))
        try:
            return read(json.loads(client.post(path, body=request, cast_to=str)))  # unchecked: it takes time
        except InputError:  # from `read`: repeating would not mend it
            raise
        except APIStatusError as error:
            quota = getattr(error, "code", None) == "insufficient_quota"
            if error.status_code in (400, 413, 422):
                raise Refused(f"{where} refused a request ({error.status_code}: {_brief(error)})") from None
            if error.status_code not in _PASSING or quota:
                raise InputError(
                    f"{where} refused the request ({error.status_code}: {_brief(error)}): check the address, the "
                    "model's name, the key and the account; what came before is kept"
                ) from None
            fault, told = f"{error.status_code}: {_brief(error)}", error.response.headers.get("retry-after", "")
            if told.replace(".", "", 1).isdigit():
                wait = max(wait, min(float(told), 60.0))
        except APIConnectionError as error:  # timeouts too
            fault = f"{type(error).__name__}: {_brief(error)}"
        except (Malformed, ValueError) as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
            fault = f"malformed reply: {_brief(error)}"
        except OpenAIError as error:
            raise InputError(f"{where} failed ({type(error).__name__}: {_brief(error)}): check the address") from None
        if attempt == attempts or stopped.is_set():
            break
        on_retry()
        if stopped.wait(wait):
            break
    raise InputError(
        f"{where} failed {attempt} times in a row ({fault}): check that it runs; what came before is kept, and the "
        "same call goes on from there"
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
