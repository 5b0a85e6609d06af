"""Settings of the example site: for this machine and for trying things out, never for production.

With ANTHROPIC_API_KEY in the environment the site talks to the real API and spends real money,
within the limits below. Without it, it talks to the local stand-in: ``manage.py demo`` starts
one, and so does ``manage.py ai_budget_simulator``.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import django

BASE_DIR = Path(__file__).resolve().parent
env = os.environ.get

DEBUG = True
SECRET_KEY = "for development only: nothing here is worth signing"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", "testserver"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "ai_budget",
    "example_project.desk",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    # After authentication: it charges request.user.
    "ai_budget.middleware.BudgetMiddleware",
]
if find_spec("django.middleware.csp"):  # Django 6.0 and later
    MIDDLEWARE.insert(1, "django.middleware.csp.ContentSecurityPolicyMiddleware")
    SECURE_CSP = {
        "default-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
        "frame-ancestors": ["'none'"],
        "object-src": ["'none'"],
    }

ROOT_URLCONF = "example_project.urls"
WSGI_APPLICATION = "example_project.wsgi.application"
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

DATABASE = Path(env("EXAMPLE_DATABASE", str(BASE_DIR / "db.sqlite3")))
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(DATABASE),
        "OPTIONS": {
            # Readers and the one writer do not wait for each other, and a writer takes its
            # lock at once instead of failing half-way with "database is locked".
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
        },
    },
}
# What alerts and reports would send; a demo has no mail server.
MAIL_FOLDER = str(DATABASE.parent / "mail")
_TO_FILES = "django.core.mail.backends.filebased.EmailBackend"
if django.VERSION >= (6, 1):
    MAILERS = {"default": {"BACKEND": _TO_FILES, "OPTIONS": {"file_path": MAIL_FOLDER}}}
else:
    EMAIL_BACKEND = _TO_FILES
    EMAIL_FILE_PATH = MAIL_FOLDER
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
LANGUAGE_CODE = "en"
USE_TZ = True
TIME_ZONE = "UTC"

# Who sends it reads /metrics/ without signing in; empty lets nobody do that.
METRICS_TOKEN = env("METRICS_TOKEN", "")

AI_BUDGET: dict[str, Any] = {
    "DAILY_LIMIT_USD": "5",
    "MONTHLY_LIMIT_USD": "60",
    "DEFAULT_MODEL": "claude-sonnet-5-5",
    "DEFAULT_MAX_TOKENS": 800,
}
if not env("ANTHROPIC_API_KEY"):
    AI_BUDGET["API_KEY"] = "simulator"
    AI_BUDGET["BASE_URL"] = env("AI_BUDGET_SIMULATOR_URL", "http://127.0.0.1:8765")
