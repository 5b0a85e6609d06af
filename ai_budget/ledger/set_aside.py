"""What periodic work could not do: set aside and named, so that the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger.connection import RowRefused

log = logging.getLogger("ai_budget")


class SetAside:
    """The rows of one run that nothing could be done with: their kinds and keys."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Any], None] = {}

    @property
    def names(self) -> list[str]:
        """What was set aside, for people, each once and in order."""
        return [f"{kind} {key}" for kind, key in self._found]

    def keys(self, kind: str) -> list[Any]:
        """Return the keys of what was set aside of one kind."""
        return [key for of, key in self._found if of == kind]

    @contextmanager
    def on_failure(self, kind: str, key: Any) -> Iterator[None]:
        """Set a row aside that fails by its own fault; a store that fails is another matter.

        Raises ``LedgerUnavailable`` and ``CallInsideTransaction``, which pass.
        """
        try:
            yield
        except Exception as error:
            if _passes(error):
                raise
            if (kind, key) not in self._found:
                # The text of an error may quote what a caller sent.
                log.error("Set aside: %s %s (%s).", kind, ascii(key), type(error).__name__)
            self._found[kind, key] = None

    def do_together(
        self, kind: str, keys: Sequence[Any], do: Callable[[Sequence[Any]], None]
    ) -> None:
        """Do something for all keys at once; where that fails, for ever fewer of them.

        Those that it fails for alone are set aside.
        """
        if len(keys) == 1:
            with self.on_failure(kind, keys[0]):
                do(keys)
            return
        try:
            do(keys)
        except Exception as error:
            if _passes(error):
                raise
            middle = len(keys) // 2
            self.do_together(kind, keys[:middle], do)
            self.do_together(kind, keys[middle:], do)


def _passes(error: Exception) -> bool:
    """Say whether it may be done later: the store failed, or is not to be used just now."""
    if isinstance(error, RowRefused):
        return False
    return isinstance(error, (CallInsideTransaction, LedgerUnavailable))
