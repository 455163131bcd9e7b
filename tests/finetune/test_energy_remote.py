"""A remote scorer: what it is sent, what it may answer, and when it is asked again; against a server of the standard library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from tiltune.finetune.energies.cache import CachedEnergy
from tiltune.finetune.energies.energy import EnergyMeter
from tiltune.finetune.energies.error import EnergyError
from tiltune.finetune.energies.names import load_energy, parse_energy
from tiltune.finetune.energies.workers import remote as energy_remote
from tiltune.finetune.energies.workers.pool import EnergyPool
from tiltune.finetune.energies.workers.remote import from_remote
from tiltune.finetune.energies.workers.wire import pack_samples, unpack_samples

X = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
Answer = tuple[int, dict[str, str], bytes | Iterator[bytes]]


def squares(tensors: dict[str, torch.Tensor]) -> Answer:
    return 200, {}, save({"energy": tensors["x"].square().sum(1)})


def answering(body: bytes, status: int = 200, **headers: str) -> Callable[[dict[str, torch.Tensor]], Answer]:
    return lambda tensors: (status, {key.replace("_", "-"): value for key, value in headers.items()}, body)


class Scorer(ThreadingHTTPServer):
    """Answers with ``script`` first, one entry a request, and squares from then on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[dict[str, torch.Tensor]], Answer]] = []
        self.asked: list[dict[str, torch.Tensor]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Scorer

    def do_POST(self) -> None:
        tensors = load(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(tensors)
        status, headers, body = (self.server.script.pop(0) if self.server.script else squares)(tensors)
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
        for key, value in (length | headers).items():
            self.send_header(key, value)
        self.end_headers()
        with suppress(OSError):  # whoever asked may have left
            for piece in [body] if isinstance(body, bytes) else body:
                self.wfile.write(piece)

    def do_GET(self) -> None:
        raise AssertionError("nobody asks for anything")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    with Scorer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for."""
    waited: list[float] = []

    class Clock:
        sleep, monotonic, time = waited.append, time.monotonic, time.time

    monkeypatch.setattr(energy_remote, "time", Clock)
    return waited


def test_batches_go_out_with_their_context_and_come_back_in_order(scorer: Scorer) -> None:
    energy = from_remote(scorer.url, batch=4)
    assert not scorer.asked  # no network before a sample
    value = energy(X, class_labels=torch.arange(10), prompts=[f"p{i}" for i in range(10)])
    assert torch.equal(value, X.square().sum(1)) and value.dtype == torch.float32
    assert [len(one["x"]) for one in scorer.asked] == [4, 4, 2]
    assert torch.equal(torch.cat([one["context.class_labels"] for one in scorer.asked]), torch.arange(10))
    assert json.loads(bytes(scorer.asked[2]["context"].tolist())) == {"prompts": ["p8", "p9"]}
    scorer.script = [answering(save({"energy": torch.tensor([1.0, torch.inf, torch.nan, -0.25], dtype=torch.float64)}))]
    meter = EnergyMeter(energy)
    assert torch.equal(meter(X[:4]).nan_to_num(nan=7.0, posinf=torch.inf), torch.tensor([1.0, torch.inf, 7.0, -0.25]))
    assert (meter.forbidden, meter.invalid) == (1, 1)


def test_the_wire_brings_everything_back() -> None:
    x = torch.randn(3, 1, 2, dtype=torch.float64).transpose(1, 2)
    there, context = unpack_samples(pack_samples(x, {"a": torch.arange(3), "b": ("x", None, {"é": [1.5]})}))
    assert torch.equal(there, x) and torch.equal(context["a"], torch.arange(3)) and context["b"] == ["x", None, {"é": [1.5]}]
    assert unpack_samples(pack_samples(x, {}))[1] == {}
    with pytest.raises(EnergyError, match="context b cannot be sent"):
        pack_samples(x, {"b": [object()] * 3})


def test_it_is_named_like_any_energy_and_works_on_threads_and_behind_a_memory(scorer: Scorer) -> None:
    for place in ("tiltune", "tiltune.finetune.energies.workers.remote"):
        spec = parse_energy(f"0.5*{place}:from_remote({scorer.url!r}, batch=4, timeout=2.5)")
        assert (spec.scale, spec.arguments, spec.keywords) == (0.5, (scorer.url,), {"batch": 4, "timeout": 2.5})
    energy = load_energy(f"tiltune:from_remote({scorer.url!r}, batch=4)")
    with EnergyPool(energy, 3) as pool:
        cached = CachedEnergy(pool)
        meter = EnergyMeter(cached)
        assert torch.equal(meter(X), X.square().sum(1)) and torch.equal(meter(X), X.square().sum(1))
    assert (meter.calls, meter.cache_hits, len(scorer.asked)) == (10, 10, 5)


def test_a_busy_server_is_asked_again_and_then_answers(scorer: Scorer, waits: list[float]) -> None:
    soon = formatdate(time.time() + 100, usegmt=True)
    scorer.script = [
        answering(b"starting", 503),
        answering(b"", 500),
        answering(b"", 429, Retry_After="7"),
        answering(b"", 429, Retry_After=soon),
        answering(b"", 502, Retry_After="whenever"),
    ]
    assert torch.equal(from_remote(scorer.url)(X), X.square().sum(1))
    assert waits[:3] == [0.5, 1.0, 7.0] and 95 < waits[3] <= 100 and waits[4:] == [8.0]
    assert len(scorer.asked) == 6


def test_it_gives_up_after_the_last_retry_and_at_once_where_asking_again_is_no_use(scorer: Scorer, waits: list[float]) -> None:
    scorer.script = [answering(b"no   GPU", 503)] * 3
    with pytest.raises(EnergyError, match=r"said 503 .*\(no GPU\), 3 times"):
        from_remote(scorer.url, retries=2)(X)
    assert waits == [0.5, 1.0] and len(scorer.asked) == 3 and not scorer.script
    for status, headers, said in [
        (404, {}, "said 404"),
        (302, {"Location": scorer.url}, "said 302"),
        (429, {"Retry_After": "4000"}, "asks to wait 4,000 s"),
    ]:
        scorer.asked.clear()
        scorer.script = [answering(b"", status, **headers)]
        with pytest.raises(EnergyError, match=said):
            from_remote(scorer.url)(X)
        assert len(scorer.asked) == 1
    assert len(waits) == 2


def test_nobody_there_and_a_connection_cut_off(scorer: Scorer, waits: list[float]) -> None:
    whole = save({"energy": X.square().sum(1)})
    scorer.script = [answering(whole[:-8], Content_Length=str(len(whole)), Connection="close")]
    assert torch.equal(from_remote(scorer.url)(X), X.square().sum(1)) and len(scorer.asked) == 2
    with Scorer() as gone:
        pass
    with pytest.raises(EnergyError, match=r"could not be asked .*refused.*, 2 times"):
        from_remote(gone.url, retries=1)(X)
    assert waits == [0.5, 0.5]


def test_a_server_that_is_silent_or_trickles_runs_out_of_time(scorer: Scorer, waits: list[float]) -> None:
    release = threading.Event()

    def silent(tensors: dict[str, torch.Tensor]) -> Answer:
        release.wait(5)
        return squares(tensors)

    def trickle() -> Iterator[bytes]:
        while not release.wait(0.02):
            yield b"."

    scorer.script = [silent]
    with pytest.raises(EnergyError, match="timed out"):
        from_remote(scorer.url, timeout=0.2, retries=0)(X)
    scorer.script = [lambda tensors: (200, {"Content-Length": "1000"}, trickle())]
    with pytest.raises(EnergyError, match="no whole answer within"):
        from_remote(scorer.url, timeout=0.2, retries=0)(X)
    release.set()
    assert torch.equal(from_remote(scorer.url, timeout=5)(X), X.square().sum(1))  # the control
    assert not waits


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "cannot be read: it is not safetensors"),
        (b"[1, 2]" * 10, "cannot be read: it is not safetensors"),
        (save({"energies": torch.zeros(10)}), "holds no tensor named energy .but energies"),
        (save({"energy": torch.zeros(9)}), r"shape \(9,\) for 10 samples"),
        (save({"energy": torch.zeros(10, 1)}), r"shape \(10, 1\) for 10 samples"),
        (save({"energy": torch.zeros(10, dtype=torch.int32)}), "returned torch.int32"),
        (save({"energy": torch.zeros(10), "more": torch.zeros(20_000)}), "more than 65,616 bytes"),
    ],
)
def test_a_malformed_or_oversized_answer_stops_it_at_once(body: bytes, said: str, scorer: Scorer, waits: list[float]) -> None:
    scorer.script = [answering(body)]
    with pytest.raises(EnergyError, match=said):
        from_remote(scorer.url)(X)
    assert len(scorer.asked) == 1 and not waits
    assert torch.equal(from_remote(scorer.url)(X), X.square().sum(1))  # the control


def test_addresses_and_numbers_that_cannot_be_right() -> None:
    for url, said in [
        ("file:///etc/passwd", "not one of http"),
        ("scorer:8000", "not one of http"),
        ("http:///score", "not one of http"),
        ("http://me:secret@scorer/", "scorer holds a password"),
    ]:
        with pytest.raises(ValueError, match=said) as caught:
            from_remote(url)
        assert "secret" not in str(caught.value)
    for options in ({"batch": 0}, {"retries": -1}, {"timeout": 0.0}, {"timeout": float("inf")}):
        with pytest.raises(ValueError, match="give at least 1"):
            from_remote("http://scorer/", **options)
