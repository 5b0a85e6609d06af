"""Reads rendered pages as a browser under a strict content security policy would."""

from __future__ import annotations

from html.parser import HTMLParser


class Violations(HTMLParser):
    """Collects what ``default-src 'self'`` would block, and controls without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._labelled: set[str] = set()
        self._controls: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._check_attributes(tag, given)
        if tag == "style":
            self.found.append("<style>")
        if tag == "script":
            self._script = True
            if not given.get("src"):
                self.found.append("<script> without src")
        if tag == "label":
            self._labelled.add(given.get("for") or "")
        if tag in ("textarea", "select", "meter", "input"):
            hidden = given.get("type") in ("hidden", "submit")
            if not hidden:
                self._controls.append(given.get("id") or "without id")

    def _check_attributes(self, tag: str, given: dict[str, str | None]) -> None:
        for name, value in given.items():
            if name == "style" or name.startswith("on"):
                self.found.append(f"{name} of <{tag}>")
            if name in ("src", "href", "action") and not _is_local(value or ""):
                self.found.append(f"{name}={value} of <{tag}>")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = False

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.found.append("text in <script>")

    def unlabelled(self) -> list[str]:
        return [control for control in self._controls if control not in self._labelled]


def violations(html: str) -> list[str]:
    """Return what is wrong with a page, an empty list for a good one."""
    reader = Violations()
    reader.feed(html)
    reader.close()
    return [*reader.found, *(f"no label for {control}" for control in reader.unlabelled())]


def _is_local(address: str) -> bool:
    return not address.startswith(("http:", "https:", "//", "data:", "javascript:"))
