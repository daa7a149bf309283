"""The page at `/`: what is sent, to whom, and under which policy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from server.test_operations import app, ask

import pace.server
from pace.server.endpoints.page import PAGE_PATHS
from pace.server.keys import Keys

FOLDER = Path(pace.server.__file__).parent / "page"


def test_the_page_needs_no_key_and_comes_under_a_strict_policy() -> None:
    answers = ask(app(Keys(["right"])), *(("GET", path, {}) for path in PAGE_PATHS))
    for (name, kind), answer in zip(PAGE_PATHS.values(), answers, strict=True):
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.content == (FOLDER / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_without_the_page_its_paths_are_as_all_others() -> None:
    for path in PAGE_PATHS:
        assert ask(app(Keys(["right"]), has_page=False), ("GET", path, {}))[0].status_code == 401
        assert ask(app(has_page=False), ("GET", path, {}))[0].status_code == 404


def test_only_the_page_answers_at_its_paths() -> None:
    paths = ["/index.html", "/page.py", "/page.css/", "/page", "/__init__.py", "/page/page.css"]
    for answer in ask(app(), *(("GET", path, {}) for path in paths)):
        assert answer.status_code == 404
    (answer,) = ask(app(), ("POST", "/", {"content": b"{}"}))
    assert answer.status_code == 405


def test_every_file_is_sent_and_every_name_in_them_exists() -> None:
    assert {name for name, _ in PAGE_PATHS.values()} == {path.name for path in FOLDER.iterdir()}
    html = (FOLDER / "index.html").read_text()
    sent = {path.removeprefix("/") for path in PAGE_PATHS}
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', html)) <= sent
    for script in FOLDER.glob("*.js"):
        text = script.read_text()
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= sent
        identifiers = set(re.findall(r'\$\("([a-z-]+)"\)', text))
        assert identifiers <= set(re.findall(r'id="([^"]+)"', html))


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: str(path.name))
def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(path: Path) -> None:
    text = path.read_text()
    allowed = ("http://www.w3.org/2000/svg",)
    assert all(url.startswith(allowed) for url in re.findall(r'https?://[^\s"\'`)?(\[\\]+', text))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
    )
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", text)
