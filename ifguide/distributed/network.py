"""The network that machines reach each other by."""

from __future__ import annotations

import os

GLOO = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address; None: it has no such one."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def name_interface(address: str) -> None:
    """Have gloo listen where other machines reach this one, unless the environment says where: by itself it takes what
    the host's name stands for, which /etc/hosts may call 127.0.1.1."""
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(GLOO, name)
