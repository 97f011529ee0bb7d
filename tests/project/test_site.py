# SPDX-License-Identifier: Apache-2.0
"""The documentation site: it builds without a warning, and its reference is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mpi_ckpt
from mpi_ckpt import checkpoint, elastic, errors
from mpi_ckpt.integrations import horovod, lightning, observe, torch_distributed

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
BUILT = ("tutorials/torch", "reference/api", "reference/errors", "faq", "how-to/disk")


def described(page):
    text = (DOCS / "reference" / page).read_text()
    return re.findall(r"^::: (mpi_ckpt\.[\w.]+)$", text, re.MULTILINE)


def home(value):
    return f"{value.__module__}.{value.__qualname__}"


def test_every_public_name_is_in_the_reference():
    homes = {home(getattr(mpi_ckpt, name)) for name in mpi_ckpt.__all__}
    assert homes - set(described("api.md")) == set()


@pytest.mark.parametrize(
    "package", [checkpoint, horovod, lightning, observe, torch_distributed, elastic]
)
def test_every_name_of_an_integration_is_in_the_reference(package):
    pytest.importorskip("torch")
    if package is lightning:
        pytest.importorskip("lightning")
    homes = {home(getattr(package, name)) for name in package.__all__}
    known = {*described("integrations.md"), *described("api.md")}
    assert homes - known == set()


def test_each_name_is_in_the_reference_once():
    names = [*described("api.md"), *described("integrations.md")]
    assert len(names) == len(set(names))


def test_every_error_is_explained():
    text = (DOCS / "reference" / "errors.md").read_text()
    names = set(errors.__all__) - {"CheckpointError", "RestoreError"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(
            r": ([\w/-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE
        )
    )
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert listed == there


class Links(HTMLParser):
    """The targets of the links and the anchors of a page."""

    def __init__(self):
        super().__init__()
        self.targets, self.anchors = [], set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[key] for key in ("id", "name") if given.get(key))
        if tag == "a" and given.get("href"):
            self.targets.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    built = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return built


@pytest.mark.full
def test_the_site_has_its_pages_and_a_search(site):
    for page in BUILT:
        assert (site / page / "index.html").is_file()
    index = (site / "search" / "search_index.json").read_text()
    assert "did not arrive" in index
    reference = (site / "reference" / "api" / "index.html").read_text()
    assert "deadline_seconds" in reference


@pytest.mark.full
def test_every_link_of_the_site_leads_to_a_place(site):
    pages = {}
    for path in site.rglob("*.html"):
        pages[path.resolve()] = links = Links()
        links.feed(path.read_text())
    broken = []
    for path, links in pages.items():
        for target in links.targets:
            if path.name == "404.html" or re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            there = (path.parent / place).resolve() if place else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (
                anchor and there in pages and anchor not in pages[there].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


@pytest.mark.full
def test_no_page_asks_another_host(site):
    for path in site.rglob("*.html"):
        loads = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*?(?=>)', path.read_text())
        scripts = [url for url in loads if url.endswith((".js", ".css"))]
        assert scripts == [], path
