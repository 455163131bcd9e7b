"""The other end of a worker process of `EnergyPool`: loads the energy that the user named, and answers until nobody asks."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

import torch

from ...distributed.signals import PREEMPTING
from ..energy import call_energy
from ..error import EnergyError, energy_name
from ..names import combine
from .wire import pack_energies, unpack_samples

ANSWER, REFUSAL = b"+", b"-"  # the first byte of what is sent back: energies, or an `EnergyError`


def main() -> None:
    """``argv``: the file descriptor of the connection, and as JSON the terms and the module where they are looked up."""
    for number in (signal.SIGINT, *PREEMPTING):  # whether to stop is up to the process that asks
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    connection = Connection(int(sys.argv[1]))
    terms, search = json.loads(sys.argv[2])
    questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, questions), daemon=True).start()
    try:
        energy = combine(terms, search)
    except ValueError as error:
        packed = error if isinstance(error, EnergyError) else EnergyError(str(error))
        connection.send_bytes(REFUSAL + packed.pack())
        return
    connection.send_bytes(ANSWER)
    name = energy_name(energy)
    while True:
        x, context = unpack_samples(questions.get())
        try:
            value = call_energy(energy, x, context, name)
        except EnergyError as error:
            connection.send_bytes(REFUSAL + error.pack())
        else:
            connection.send_bytes(ANSWER + pack_energies(value, energy.term_values))


def _receive(connection: Connection, questions: queue.SimpleQueue[bytes]) -> None:
    """Where nobody asks any more, this process ends at once, with whatever its energy has started."""
    try:
        while True:
            questions.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # of a session of its own
