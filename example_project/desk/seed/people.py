"""The forty people of the demo: a few who ask all day, and many who rarely do."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import make_password

from example_project.desk.accounts import DEMO_ACCOUNTS

# The busiest first: each asks a little less than the one before.
NAMES = (
    "Ingrid Solheim", "Tomás Herrera", "Ada Lovelace", "Priya Raman", "Jonas Weber",
    "Chidi Okafor", "Mei-Ling Chen", "Sofia Rossi", "Grace Hopper", "Elif Demir",
    "Noah Fischer", "Amara Diallo", "Lucas Moreau", "Hana Suzuki", "Oskar Lindqvist",
    "Fatima Zahra", "Daniel Novák", "Leila Haddad", "Marek Kowalski", "Camille Laurent",
    "Ravi Menon", "Astrid Berg", "Kwame Mensah", "Julia Petrova", "Diego Fuentes",
    "Nora Byrne", "Yusuf Aydin", "Linh Tran", "Emil Hansen", "Rosa Marchetti",
    "Samuel Adeyemi", "Klara Horvat", "Mateo Silva", "Ayesha Khan", "Finn O’Connor",
    "Ilse Vermeer", "Paulo Ribeiro", "Zofia Nowak", "Hassan Karimi", "Greta Olsson",
)  # fmt: skip
_TEAM_PLAN_EVERY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One who asks: ``weight`` is their share of the traffic."""

    user_id: Any
    plan: str
    weight: float


def create_people() -> list[Person]:
    """Create the accounts that are missing. Only the demo's own can sign in."""
    model: Any = get_user_model()
    for account in DEMO_ACCOUNTS:
        if not model.objects.filter(username=account.username).exists():
            model.objects.create_user(
                account.username,
                f"{account.username}@desk.example",
                account.username,
                first_name=account.first_name,
                last_name=account.last_name,
                is_staff=account.is_staff,
                is_superuser=account.is_staff,
            )
    usernames = [_username(name) for name in NAMES]
    existing = set(model.objects.filter(username__in=usernames).values_list("username", flat=True))
    model.objects.bulk_create(
        [
            _account(model, name)
            for name, username in zip(NAMES, usernames, strict=True)
            if username not in existing
        ]
    )
    ids: Mapping[str, Any] = dict(
        model.objects.filter(username__in=usernames).values_list("username", "pk")
    )
    return [
        Person(
            user_id=ids[username],
            plan="team" if rank % _TEAM_PLAN_EVERY == 0 else "free",
            weight=1 / (rank + 2.5),
        )
        for rank, username in enumerate(usernames)
    ]


def _account(model: Any, name: str) -> Any:
    first, last = name.split(" ", 1)
    username = _username(name)
    return model(
        username=username,
        email=f"{username}@desk.example",
        first_name=first,
        last_name=last,
        password=make_password(None),
    )


def _username(name: str) -> str:
    """Return the short name of a demo account, else a name like ``ingrid.solheim``."""
    for account in DEMO_ACCOUNTS:
        if name == f"{account.first_name} {account.last_name}":
            return account.username
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return plain.lower().replace(" ", ".")
