"""Money as integer nano-dollars.

One nano-dollar is 10^-9 US dollars. Every amount inside the project is an ``int``
of nano-dollars, every amount at its edges a ``Decimal`` of dollars, and nothing is
ever a ``float``: 0.1 + 0.2 must not decide whether a limit holds.
"""

from __future__ import annotations

from decimal import Context, Decimal, InvalidOperation, localcontext

NANO_PER_USD = 1_000_000_000
MAX_NANOUSD = 2**63 - 1  # a BIGINT: a little over 9.2 billion dollars


def parse_usd(value: Decimal | int | str) -> int:
    """Return dollars as nano-dollars, exactly.

    Raises ``TypeError`` for a float (which has no exact dollars) and ``ValueError`` for
    anything that is not a finite amount of at most nine decimals that a BIGINT can hold.
    """
    if isinstance(value, bool) or not isinstance(value, (Decimal, int, str)):
        raise TypeError(f"dollars must be a Decimal, int or str, not {type(value).__name__}")
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise ValueError(f"{value!r} is not an amount of dollars") from None
    if not amount.is_finite():
        raise ValueError(f"{value!r} is not a finite amount of dollars")
    # By their magnitude first: arithmetic on the most extreme ones fails in its own way.
    if amount and amount.adjusted() > 10:
        raise ValueError(f"{value!r} dollars are more than can be stored")
    if amount and amount.adjusted() < -9:
        raise ValueError(f"{value!r} has more than nine decimals")
    # The caller's context may have less precision than an amount has digits.
    with localcontext(Context(prec=50)):
        if abs(amount) > Decimal(MAX_NANOUSD) / NANO_PER_USD:
            raise ValueError(f"{value!r} dollars are more than can be stored")
        nanousd = amount * NANO_PER_USD
        whole = int(nanousd)
        if whole != nanousd:
            raise ValueError(f"{value!r} has more than nine decimals")
    return whole


def to_usd(nanousd: int) -> Decimal:
    """Return nano-dollars as dollars, exactly."""
    sign, digits, _ = Decimal(nanousd).as_tuple()
    return Decimal((sign, digits, -9))


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide and round up, the only rounding that money ever gets."""
    return -(-numerator // denominator)


def format_usd(nanousd: int, *, decimals: int = 2) -> str:
    """Return an amount for people: ``$1,234.50``, and ``<$0.01`` rather than a false zero.

    The figure is rounded half up; an amount too small to show says so.
    """
    sign = "-" if nanousd < 0 else ""
    unit = 10 ** (9 - decimals)
    rounded = (abs(nanousd) + unit // 2) // unit
    if rounded == 0 and nanousd:
        return f"<{sign}${Decimal(1).scaleb(-decimals)}"
    return f"{sign}${Decimal(rounded).scaleb(-decimals):,.{decimals}f}"
