from __future__ import annotations

from django.apps import AppConfig


class UserModelConfig(AppConfig):
    name = "tests.usermodel"
    label = "usermodel"
