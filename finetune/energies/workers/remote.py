"""A scorer behind HTTP: samples are posted in batches, energies come back, and what fails for a moment is asked again."""

from __future__ import annotations

import http.client
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import torch
from torch import Tensor

from ..energy import Energy
from ..error import EnergyError
from .wire import pack_samples, unpack_energies

MEDIA = "application/octet-stream"
FIRST_WAIT, LONGEST_WAIT = 0.5, 300.0  # seconds between two attempts: doubled each time
HEADER = 65_536  # bytes that an answer may have besides eight for each energy


def from_remote(url: str, *, batch: int = 64, timeout: float = 60.0, retries: int = 5) -> Energy:
    """E(x) as the server at ``url`` gives it: ``--energy "tiltune:from_remote('http://scorer:8000/')"``.

    Posted is a safetensors body with ``x`` [b, ...] float32 and the context, returned one with ``energy`` [b] (`wire`).
    batch: rows of one request, at most. timeout: seconds for one request. retries: how often a request is sent again where the
    connection fails, the time is up, or the server is busy (5xx, 429), after 0.5 s, then twice as long each time, or as long as
    its Retry-After says. It follows no redirect. `EnergyPool` sends several requests at once.

    Errors: ValueError for a URL that is none; EnergyError for other statuses, for answers that are not one floating number a
    sample, and after the last retry.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the scorer's address {url!r} is not one of http; write http://HOST:PORT/PATH.")
    if parts.username is not None:
        raise ValueError(
            f"the address of the scorer {parts.hostname} holds a password, which every run would save; leave it out."
        )
    if batch < 1 or retries < 0 or not 0 < timeout < math.inf:
        raise ValueError(
            f"batch is {batch}, timeout {timeout}, retries {retries}; give at least 1, positive seconds, at least 0."
        )

    def energy(x: Tensor, **context: Any) -> Tensor:
        answers = []
        for first in range(0, len(x), batch):
            rows = slice(first, first + batch)
            part = {key: value[rows] for key, value in context.items()}
            answers.append(_ask(url, pack_samples(x[rows].float(), part), len(x[rows]), timeout, retries))
        return torch.cat(answers).to(x.device)

    energy.__name__ = f"from_remote({url})"
    return energy


def _ask(url: str, question: bytes, count: int, timeout: float, retries: int) -> Tensor:
    wait, failed = FIRST_WAIT, ""
    for attempt in range(retries + 1):
        try:
            answer = _post(url, question, HEADER + 8 * count, timeout)
        except urllib.error.HTTPError as error:
            said = ""
            with error, suppress(OSError, http.client.HTTPException):
                said = " ".join(error.read(300).decode(errors="replace").split())
            failed = f"said {error.code} {error.reason}" + (f" ({said})" if said else "")
            if error.code < 500 and error.code != 429:
                raise EnergyError(f"the scorer at {url} {failed} for {count} samples; asking again would not help.") from None
            pause = max(wait, _retry_after(error.headers.get("Retry-After")))
            if pause > LONGEST_WAIT:
                raise EnergyError(f"the scorer at {url} {failed} and asks to wait {pause:,.0f} s; start again then.") from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, too slow
            failed, pause = f"could not be asked ({getattr(error, 'reason', None) or str(error) or type(error).__name__})", wait
        else:
            return _checked(answer, url, count)
        if attempt < retries:
            time.sleep(min(pause, LONGEST_WAIT))
            wait = min(2 * wait, LONGEST_WAIT)
    raise EnergyError(f"the scorer at {url} {failed}, {retries + 1} times; see whether it runs, or raise retries or timeout.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the samples elsewhere, and turns a POST into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, question: bytes, limit: int, timeout: float) -> bytes:
    """The body of the answer.

    Errors: HTTPError and OSError as urllib raises them; TimeoutError also for a trickle; EnergyError above ``limit``.
    """
    until = time.monotonic() + timeout
    request = urllib.request.Request(url, question, {"Content-Type": MEDIA, "Accept": MEDIA})
    answer = bytearray()
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
        while piece := response.read1(65_536):
            answer += piece
            if len(answer) > limit:
                raise EnergyError(
                    f"the scorer at {url} answered with more than {limit:,} bytes; it should send the energies only."
                )
            if time.monotonic() > until:
                raise TimeoutError(f"no whole answer within {timeout:g} s")
        if response.length:  # read1 does not tell
            raise http.client.IncompleteRead(bytes(answer), response.length)
    return bytes(answer)


def _checked(answer: bytes, url: str, count: int) -> Tensor:
    try:
        energy, _ = unpack_energies(answer)
    except ValueError as error:
        raise EnergyError(
            f"the answer of the scorer at {url} cannot be read: {error}; see the format in docs/howto.md."
        ) from None
    if energy.shape != (count,) or not energy.is_floating_point():
        raise EnergyError(
            f"the scorer at {url} returned {energy.dtype} of shape {tuple(energy.shape)} for {count} samples; return one floating"
            f" number a sample, shape ({count},)."
        )
    return energy


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or as a date; 0 where it cannot be read."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
