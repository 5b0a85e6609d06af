"""How Sphinx builds the documentation: ``make docs``, warnings are errors."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import django

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()  # so that autodoc can import the models

project = "django-ai-budget"
author = "django-ai-budget contributors"
copyright = "2026, django-ai-budget contributors"
release = installed_version("django-ai-budget")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"django-ai-budget {release}"
