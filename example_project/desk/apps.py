"""The entry of the reading desk in INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig


class DeskConfig(AppConfig):
    name = "example_project.desk"
    verbose_name = "Reading desk"
