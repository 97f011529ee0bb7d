# SPDX-License-Identifier: Apache-2.0
"""What a package index and a reader of licences get."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mpi_ckpt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

sys.path.insert(0, str(REPOSITORY / "scripts" / "site"))
import index_page  # noqa: E402

sys.path.pop(0)

LICENCE = "SPDX-License-Identifier: Apache-2.0"
_BARE = {".md", ".json", ".jsonl", ".safetensors", ".bin", ".npz", ".typed", ".png", ".svg"}


def tracked():
    """Return the files of the repository, without what has no place for a comment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [
        path
        for path in paths
        if path.is_file()
        and path.suffix not in _BARE
        and path.name != "LICENSE"
        and "golden" not in path.parts
        and path.stat().st_size
    ]


def test_every_file_says_its_licence():
    silent = [
        str(path.relative_to(REPOSITORY))
        for path in tracked()
        if LICENCE not in path.read_text(errors="replace")[:200]
    ]
    assert silent == []


def test_versions_agree():
    assert PROJECT["version"] == mpi_ckpt.__version__
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"version: {mpi_ckpt.__version__}\n" in citation


def test_metadata_say_who_what_and_where():
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["authors"]
    assert len(PROJECT["keywords"]) > 5
    minimum = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    versions = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert [int(version) for version in versions] == [*range(minimum, minimum + 4)]
    assert any(line.startswith("Topic ::") for line in PROJECT["classifiers"])


def test_links_on_an_index_page_work_or_are_text():
    text = (REPOSITORY / "README.md").read_text()
    bare = index_page.with_absolute_links(text, "")
    assert re.findall(r"\]\((?!https?:)[^)]*\)", bare) == []
    assert "[" not in index_page.with_absolute_links("see [a `b` c](docs/x.md)", "")
    linked = index_page.with_absolute_links(text, "https://forge.example/mpi_ckpt/")
    assert re.findall(r"\]\((?!https?:)[^)]*\)", linked) == []
    assert "(https://forge.example/mpi_ckpt/blob/main/docs/guarantees.md)" in linked
    kept = "[a](https://x.example/y)"
    assert index_page.with_absolute_links(kept, "") == kept


def test_metadata_of_a_release_name_the_repository():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert index_page.with_urls(text, "") == text
    project = tomllib.loads(index_page.with_urls(text, "https://forge.example/mpi_ckpt"))
    urls = project["project"]["urls"]
    assert urls["Repository"] == "https://forge.example/mpi_ckpt"
    assert project["project"]["scripts"] == PROJECT["scripts"]
