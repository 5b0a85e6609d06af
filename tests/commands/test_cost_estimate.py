from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from ai_budget import periods

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SMALL = ("--calls-per-day=1000", "--input-tokens=1000", "--output-tokens=100")
LARGE = ("--calls-per-day=50000", "--input-tokens=3000", "--output-tokens=400")

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


def estimate(*args: str, model: str = "claude-sonnet-5-5", **options: Any) -> str:
    out, err = StringIO(), StringIO()
    call_command("cost_estimate", f"--model={model}", *args, stdout=out, stderr=err, **options)
    assert err.getvalue() == ""
    return out.getvalue()


def data(*args: str, **options: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(estimate("--format=json", *args, **options))
    return parsed


# For people --------------------------------------------------------------------------------------


def test_the_table_shows_the_bill_and_the_levers() -> None:
    assert estimate(*SMALL) == (
        "claude-sonnet-5-5: 1,000 calls a day, 1,000 tokens in and 100 out\n"
        "=================================================================\n"
        "\n"
        "Per call      $0.003000\n"
        "Per day       $3.00\n"
        "Per month     $90.00 (30 days)\n"
        "\n"
        "What would lower it, each alone\n"
        "  Lever            How                              Month   Saves\n"
        "  cheaper model    claude-haiku-5-5                 $4.50  $85.50  95.0 %\n"
        "  batch            answers within 24 hours         $45.00  $45.00  50.0 %\n"
        "  response cache   20 % of calls answered from it  $72.00  $18.00  20.0 %\n"
        "  shorter answers  answers of 75 tokens            $82.50   $7.50   8.3 %\n"
    )


def test_levers_in_use_are_told_apart() -> None:
    shown = estimate(*LARGE, "--cache-hit-rate=30%", "--cached-prefix=2000", "--batch")

    used, left = shown.split("In use\n")[1].split("What would lower it, each alone\n")
    assert "30 % of calls answered from it" in used
    assert "2,000 tokens for 5m, 30 % reads" in used
    assert "answers within 24 hours" in used
    assert "claude-haiku-5-5" in left
    assert "batch" not in left


def test_it_says_what_the_prompt_cache_is_reckoned_for() -> None:
    assert "come at random" in estimate(*SMALL, "--cached-prefix=600")
    assert "come at random" not in estimate(*SMALL)


def test_above_ten_thousand_dollars_it_advises_to_reconsider() -> None:
    """Opus: 3,000 x $4 + 400 x $20 per million are $0.02; 50,000 a day are $30,000 a month."""
    shown = estimate(*LARGE, model="claude-opus-5-5")

    assert "Per month     $30,000.00 (30 days)" in shown
    assert shown.endswith(
        "This is above $10,000 a month: reconsider before you build it.\n"
        "What would help most: cheaper model (claude-haiku-5-5), which saves $29,250.00 a month.\n"
    )


def test_it_says_so_where_no_lever_is_left() -> None:
    """The response cache is in use, so is the prompt cache, for which a batch would be too slow."""
    shown = estimate(
        "--calls-per-day=10000000",
        "--input-tokens=100000",
        "--output-tokens=0",
        "--cached-prefix=100000",
        "--cache-hit-rate=1%",
        model="claude-haiku-5-5",
    )

    assert "What would lower it" not in shown
    assert "No lever is left that would lower it" in shown


@pytest.mark.parametrize("calls", ["1", "100000000"])
def test_the_table_fits_a_terminal(calls: str) -> None:
    args = ("--input-tokens=90000", "--output-tokens=9000", "--cached-prefix=80000")

    shown = estimate(f"--calls-per-day={calls}", *args, model="claude-opus-4-5-20251101")

    assert max(map(len, shown.splitlines())) <= 100


# For programs ------------------------------------------------------------------------------------


def test_json_keeps_its_keys_and_exact_dollars() -> None:
    assert data(*SMALL, "--cache-hit-rate=0.25", "--days=31", model="claude-haiku-5-5") == {
        "model": "claude-haiku-5-5",
        "calls_per_day": 1000,
        "input_tokens": 1000,
        "output_tokens": 100,
        "cache_hit_rate": "0.25",
        "cached_prefix_tokens": 0,
        "prompt_cache": "off",
        "batch": False,
        "days": 31,
        # 1,000 x $0.10 + 100 x $0.50 per million are $0.00015, three quarters of which is paid.
        "per_call_usd": "0.000112500",
        "per_day_usd": "0.112500000",
        "per_month_usd": "3.487500000",
        "levers": [
            {
                "lever": "response_cache",
                "detail": "25 % of calls answered from it",
                "used": True,
                "per_month_usd": "3.487500000",
                "saving_usd": "1.162500000",
                "saving_percent": "25.0",
            },
            {
                "lever": "batch",
                "detail": "answers within 24 hours",
                "used": False,
                "per_month_usd": "1.743750000",
                "saving_usd": "1.743750000",
                "saving_percent": "50.0",
            },
            {
                "lever": "output",
                "detail": "answers of 75 tokens",
                "used": False,
                "per_month_usd": "3.196875000",
                "saving_usd": "0.290625000",
                "saving_percent": "8.3",
            },
        ],
        "reconsider": False,
        "best_lever": {"lever": "batch", "detail": "answers within 24 hours"},
    }


def test_json_is_the_same_each_time() -> None:
    args = (*LARGE, "--cached-prefix=2000", "--format=json")

    assert estimate(*args) == estimate(*args)


@pytest.mark.parametrize("rate", ["0.3", "30%", 0.3])
def test_a_hit_rate_is_a_share_or_a_percentage(rate: Any) -> None:
    assert data(*SMALL, cache_hit_rate=rate)["per_month_usd"] == "63.000000000"


def test_a_program_may_pass_numbers() -> None:
    shown = estimate(calls_per_day=1000, input_tokens=1000, output_tokens=100, days=1, batch=True)

    assert "Per month     $1.50 (1 day)" in shown


# What makes no sense -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--calls-per-day=0",), "Calls a day must be a whole number from 1"),
        (("--calls-per-day=many",), "--calls-per-day must be a whole number, not 'many'"),
        (("--calls-per-day=1e3",), "--calls-per-day must be a whole number"),
        (("--input-tokens=-1",), "Input tokens must be a whole number from 1 on, not -1"),
        (("--output-tokens=1.5",), "--output-tokens must be a whole number, not '1.5'"),
        (("--cached-prefix=1001",), "is longer than the prompt"),
        (("--cache-hit-rate=130%",), "--cache-hit-rate must be a share such as 0.3 or 30%"),
        (("--cache-hit-rate=often",), "--cache-hit-rate must be a share"),
        (("--days=0",), "Days must be a whole number from 1 to 31"),
        (("--format=csv",), "--format must be table or json, not 'csv'"),
        (("--input-tokens=2000000",), "do not fit into the context window"),
        (("--model=claude-nonsense",), "add a model rate in admin"),
        (("--colour",), "unrecognized arguments"),
    ],
)
def test_what_makes_no_sense_is_one_line(args: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError) as caught:
        estimate(*SMALL, *args)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.returncode == 2


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CommandError, match="--input-tokens, --output-tokens"):
        estimate("--calls-per-day=5")


def test_a_script_sees_one_line_on_stderr_and_exit_code_2() -> None:
    command = [sys.executable, "-P", "-m", "django", "cost_estimate", "--model=x", *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [*command, "--days=99"], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: Days must be a whole number from 1 to 31, not 99.\n"
