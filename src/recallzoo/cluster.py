"""Ray, where it is installed: connecting to a cluster, or starting one on this machine."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recallzoo.errors import UserError

ANSWER_SECONDS = 10.0
"""Time within which a cluster's address must answer."""


@contextmanager
def connected(
    address: str | None = None, num_cpus: int | None = None, instead: str = ""
) -> Iterator[Any]:
    """The `ray` module, connected. What was connected before stays so afterwards.

    address    host:port, "auto" for a cluster that this machine is part of; None: the one that
               RAY_ADDRESS names, or one of this machine's CPUs and GPUs for as long as this lasts
    num_cpus   CPUs of one that is started here; those of the machine if None
    instead    what a user can do without Ray, for the error

    Raises UserError if Ray is not installed or no cluster answers.
    """
    try:
        import ray as installed
    except ImportError as error:
        raise UserError(
            f"this needs Ray, which is not installed: pip install 'recallzoo[ray]'{instead}."
        ) from error
    ray: Any = installed  # its stubs know neither remote functions nor ray.exceptions
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _require_answer(address)
        ray.init(
            address=address,
            num_cpus=num_cpus if address == "local" else None,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at {address!r}: {error}. Start one with `ray start --head`, "
            f"or leave the address out to use this machine alone."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def is_connected() -> bool:
    """Whether `connected` would yield a cluster that is connected already."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _require_answer(address: str) -> None:
    """OSError if nothing listens at host:port: Ray itself would go on trying for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
