"""The accounts of the demo, whose passwords anyone may know."""

from __future__ import annotations

from typing import NamedTuple


class DemoAccount(NamedTuple):
    """One who can sign in, with the user name as password."""

    username: str
    first_name: str
    last_name: str
    is_staff: bool = False


DEMO_ACCOUNTS = (
    DemoAccount("admin", "Mary", "Somerville", is_staff=True),
    DemoAccount("ada", "Ada", "Lovelace"),
    DemoAccount("grace", "Grace", "Hopper"),
)
