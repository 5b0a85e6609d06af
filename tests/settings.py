"""The settings of the test suite; environment variables choose the backend and the variant.

``AI_BUDGET_TEST_DB``            ``sqlite`` (the default), ``postgresql`` or ``mariadb``
``AI_BUDGET_TEST_DB_NAME``       the test database's name; one per run unless given
``AI_BUDGET_TEST_USER_MODEL``    ``custom`` for a user model keyed by UUID
``AI_BUDGET_TEST_AUTO_FIELD``    DEFAULT_AUTO_FIELD, for instance ``django.db.models.AutoField``
``AI_BUDGET_TEST_LEDGER``        ``redis`` for the ledger on Redis, at ``REDIS_URL``
``AI_BUDGET_TEST_ONLY``          ``database`` to leave out the tests that reach no database

The servers are found through ``PGHOST``, ``PGPORT``, ``PGUSER``, ``PGPASSWORD`` and through
``MARIADB_HOST``, ``MARIADB_PORT``, ``MARIADB_USER``, ``MARIADB_PASSWORD``.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path
from typing import Any

env = os.environ.get

# Runs at the same time do not meet, nor do the workers of one run. A process that a test starts
# inherits the name through the environment: with these settings it opens the very database the
# test is using.
GIVEN_NAME = env("AI_BUDGET_TEST_DB_NAME")
DB_NAME = GIVEN_NAME or f"test_ai_budget_{os.getpid()}"
WORKER = env("PYTEST_XDIST_WORKER", "")
if not DB_NAME.endswith(WORKER):
    DB_NAME = f"{DB_NAME}_{WORKER}"
os.environ["AI_BUDGET_TEST_DB_NAME"] = DB_NAME
# A file, not memory: threads and processes must share it as they would in production.
SQLITE_FILE = str(Path(tempfile.gettempdir(), f"{DB_NAME}.sqlite3"))
if not GIVEN_NAME:  # a management command leaves no database behind
    atexit.register(lambda: Path(SQLITE_FILE).unlink(missing_ok=True))

# No test speaks TLS. A folder without certificates saves each HTTP client 12 ms of reading them.
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

BACKENDS: dict[str, dict[str, Any]] = {
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": SQLITE_FILE,
        # A test that kills a process leaves the machine up: nothing has to reach the disk.
        "OPTIONS": {
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;",
        },
        "TEST": {"NAME": SQLITE_FILE},
    },
    "postgresql": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": env("PGHOST", "127.0.0.1"),
        "PORT": env("PGPORT", "5432"),
        "USER": env("PGUSER", "postgres"),
        "PASSWORD": env("PGPASSWORD", ""),
        "NAME": DB_NAME,
        "OPTIONS": {"options": "-c synchronous_commit=off"},
        "TEST": {"NAME": DB_NAME},
    },
    "mariadb": {
        "ENGINE": "django.db.backends.mysql",
        "HOST": env("MARIADB_HOST", "127.0.0.1"),
        "PORT": env("MARIADB_PORT", "3306"),
        "USER": env("MARIADB_USER", "root"),
        "PASSWORD": env("MARIADB_PASSWORD", ""),
        "NAME": DB_NAME,
        "OPTIONS": {"charset": "utf8mb4"},
        "TEST": {"NAME": DB_NAME, "CHARSET": "utf8mb4", "COLLATION": "utf8mb4_unicode_ci"},
    },
}
BACKEND = env("AI_BUDGET_TEST_DB", "sqlite")

if BACKEND == "mariadb":
    # Pure Python, so that the suite needs no C headers; Django accepts it as its mysqlclient.
    import pymysql

    pymysql.install_as_MySQLdb()

DATABASES = {"default": BACKENDS[BACKEND]}
DEFAULT_AUTO_FIELD = env("AI_BUDGET_TEST_AUTO_FIELD", "django.db.models.BigAutoField")
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "ai_budget",
]
if env("AI_BUDGET_TEST_USER_MODEL") == "custom":
    INSTALLED_APPS.append("tests.usermodel")
    AUTH_USER_MODEL = "usermodel.User"
# md5: no password here protects anything, and a slow hash would slow every test down.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "ai_budget.middleware.BudgetMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

SECRET_KEY = "not a secret: these are tests"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "/static/"
USE_TZ = True
TIME_ZONE = "UTC"

AI_BUDGET: dict[str, Any] = {
    "API_KEY": "test-key",
    # Nothing listens here: a test that forgets the local API fails instead of calling out.
    "BASE_URL": "http://127.0.0.1:9",
}

if env("AI_BUDGET_TEST_LEDGER") == "redis":
    AI_BUDGET["LEDGER"] = "ai_budget.ledger.redis.RedisLedger"
    AI_BUDGET["LEDGER_REDIS_URL"] = env("REDIS_URL", "redis://127.0.0.1:6379/0")
    # Runs at the same time share the server.
    CACHES["default"]["KEY_PREFIX"] = Path(str(DB_NAME)).name
