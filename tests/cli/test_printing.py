# SPDX-License-Identifier: Apache-2.0
"""Nothing that a terminal would obey gets to one, from whatever text and whichever way."""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mpi_ckpt.cli
from mpi_ckpt.cli.app import cli
from mpi_ckpt.cli.inspect import listing
from mpi_ckpt.cli.plain_text import clean, json_text
from mpi_ckpt.cli.restart import looping
from mpi_ckpt.errors import ReadError
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.states.nested import ObjectState
from tests.cli.terminals import plain, shown_in_terminal
from tests.commands import ask, fill, run
from tests.making import publish

# Of each kind one: C0, line end, CR, tab, ESC, DEL, C1 (CSI too), marks, overrides and
# isolates of the direction, zero width, separators, fillers, variation, tags, private.
DANGEROUS = [
    "\x01", "\n", "\r", "\t", "\x07", "\x1b[2J", "\x7f", "\x85", "\x9b31m", "\xad",
    "\u061c", "\u200b", "\u200d", "\u200e", "\u200f", "\u202a", "\u202e", "\u2028",
    "\u2029", "\u2060", "\u2066", "\u2069", "\ufeff", "\u034f", "\u115f", "\u180e",
    "\u3164", "\ufe0f", "\U000e0041", "\U000e01ef", "\ue000",
]  # fmt: skip
TEXT = "[red]n[/red][link=http://x]" + "".join(DANGEROUS).replace("\n", "\x0b")
ON_DISK = "n\n" + TEXT.replace("/", "")[:60]


def harmless(text: str) -> bool:
    return all(
        character == "\n"
        or (unicodedata.category(character)[0] != "C" and clean(character) == character)
        for character in text
        if unicodedata.category(character)[0] != "M"
    )


def looked_at(*words: object):
    result = run(*words)
    assert harmless(result.stdout + result.stderr), (words, result.output)
    as_json = run(*words, "--json")
    assert as_json.stdout.isascii()
    assert harmless(as_json.stdout + as_json.stderr)
    assert as_json.exit_code == result.exit_code
    return result


@pytest.mark.parametrize("text", [*DANGEROUS, "\udcff"])
def test_what_is_not_simply_shown_is_written_out(text):
    shown = clean(f"a{text}b")
    assert harmless(shown)
    assert shown.startswith("a\\")
    assert shown.isprintable()
    assert json.loads(json_text({text: [text]})) == {text: [text]}
    assert json_text({text: text}, indent=None).isprintable()


def test_whatever_unicode_has_is_shown_or_written_out():
    places = [*range(0x3100), *range(0xD800, 0x20000, 7), *range(0xE0000, 0xE0200)]
    everything = "".join(map(chr, places))
    kinds = {unicodedata.category(character) for character in clean(everything)}
    assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def test_names_of_other_scripts_stay_as_they_are():
    for name in ("Größe", "重み", "вес", "e\u0301te", "क्षत्रिय", "a b"):
        assert clean(name) == name
    assert clean("a" + "\u0300" * 9).count("\\u0300") == 5
    assert clean("\u0300a") == "\\u0300a"


def dangerous_root(root: Path) -> Path:
    for number in (1, 2):
        states = [
            ArrayState("s\u202e\u200b[red]", {TEXT: np.full(2, number)}),
            ObjectState("plain[b]\u2066", {TEXT: TEXT + str(number)}),
        ]
        publish(root, states, step=number, metrics={TEXT: 0.5, ">" + TEXT: 2.0})
    return root


def test_names_from_files_are_shown_as_they_are_or_written_out(tmp_path):
    root = dangerous_root(tmp_path / ON_DISK)
    text = run("ls", root).stdout
    assert "[red]n[/red][link=http://x]\\x01" in text.splitlines()[0]
    assert "[red]n[/red][link=http://x]\\x01" in run("show", root).stdout
    for words in (
        ["ls"], ["show", "--all", "--structure"], ["verify", "--all"], ["diff", "1", "2"],
        ["prune", "--keep-best", TEXT, "--mode", "min", "--dry-run"],
        ["prune", "--keep-best", "no" + TEXT, "--mode", "min"], ["rollback", TEXT],
        ["show", TEXT], ["show", "--state", TEXT], ["export", "--to", "/" + TEXT + "/x"],
        ["quarantine", "newest", "--reason", TEXT], ["ls"], ["rollback", "--undo"],
    ):  # fmt: skip
        looked_at(words[0], root, *words[1:])


def test_json_loses_nothing(tmp_path):
    root = dangerous_root(tmp_path / "c")
    answer = ask("show", root)
    assert set(answer["metrics"]) == {TEXT, ">" + TEXT}
    assert answer["states"][0]["leaves"][0]["name"] == TEXT
    run("quarantine", root, "1", "--reason", TEXT)
    assert ask("ls", root)["generations"][-1]["reason"] == TEXT


def test_numbers_that_json_lacks_are_told_as_text(tmp_path):
    metrics = {"a": float("inf"), "b": -float("inf"), "c": float("nan"), "d": 1.0}
    publish(tmp_path, [], metrics=metrics)
    expected = {"a": "inf", "b": "-inf", "c": "nan", "d": 1.0}
    assert ask("ls", tmp_path)["generations"][0]["metrics"] == expected
    assert ask("show", tmp_path)["metrics"] == expected
    ranked = ask("prune", tmp_path, "--keep-best", "a", "--mode", "max")["ranked_by"]
    assert ranked[0]["order"] == [{"generation": 1, "value": "inf"}]


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "--" + TEXT], [TEXT], ["ls", TEXT], ["ls", ".", TEXT], ["show", TEXT, TEXT],
        ["run", "--np", TEXT, "x"], ["run", "--np", "1", TEXT],
        ["import", TEXT, "--into", "x"],
        ["run", "--np", "1", "--launcher", TEXT, "true"], ["diff", TEXT, TEXT],
        ["run", "--np", "1", "--hostfile", TEXT, "true"], ["export", ".", "--format", TEXT],
        ["doctor", "--no-mpi", "/dev/null/" + TEXT], ["import", "x", "--into", ""],
    ],
)  # fmt: skip
def test_words_of_the_command_line_are_written_out(words):
    result = run(*words)
    assert harmless(result.output)
    if result.exit_code:
        assert result.stderr.startswith("error: ")


def test_a_path_that_is_no_text_is_written_out(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff\x9b")
    os.mkdir(path)
    assert "bad\\udcff\\udc9b" in looked_at("ls", path).stderr
    publish(Path(path), [])
    assert json.loads(run("show", path, "--json").stdout)["path"].startswith(path)
    looked_at("verify", path)


def test_a_line_end_in_a_name_makes_no_line_of_ours(tmp_path):
    told = run("ls", tmp_path / "x\nerror: all is well").stderr
    assert [line for line in told.splitlines() if line.startswith("error")] == [
        f"error: {tmp_path}/x"
    ]


def test_what_others_print_and_log_is_cleaned_too(tmp_path, monkeypatch):
    """The library's log, Python's warnings, prints of whatever is loaded."""
    fill(tmp_path, 1)

    def noisy(root):
        logging.getLogger("mpi_ckpt.storage.directory.recovery").warning(
            "log %s\nforged", TEXT
        )
        sys.stderr.write(warnings.formatwarning(f"warned {TEXT}", UserWarning, TEXT, 1))
        sys.stdout.write(f"printed {TEXT}")
        sys.stderr.write(f"said {TEXT}\n")
        return []

    monkeypatch.setattr(listing, "look", noisy)
    for words in (["ls", tmp_path], ["ls", tmp_path, "--json"]):
        result = run(*words)
        assert result.exit_code == 0
        assert harmless(result.output)
        for word in ("WARNING: log ", "warned ", "said "):
            assert word in result.stderr
        assert "  forged" in result.stderr.splitlines()
    assert json.loads(result.stdout)["generations"] == []
    assert "printed " in result.stderr
    assert sys.stdout is sys.__stdout__ or "Gate" not in type(sys.stdout).__name__


@pytest.mark.parametrize(
    "error", [ReadError(TEXT), OSError(5, "x", TEXT), MemoryError(TEXT)]
)
def test_errors_are_written_out(tmp_path, monkeypatch, error):
    fill(tmp_path, 1)

    def failing(root):
        raise error

    monkeypatch.setattr(listing, "look", failing)
    assert looked_at("ls", tmp_path).exit_code == 1


def test_a_fault_of_ours_is_written_out_with_its_traceback(tmp_path, monkeypatch):
    fill(tmp_path, 1)

    def failing(root):
        raise ZeroDivisionError(TEXT)

    monkeypatch.setattr(listing, "look", failing)
    for options in ([], ["--json"]):
        result = CliRunner().invoke(cli, ["ls", str(tmp_path), *options])
        assert result.exit_code == 1
        assert harmless(result.output)
        assert "Traceback" in result.stderr
    told = json.loads(result.stdout)["error"]
    assert (told["class"], told["kind"]) == ("ZeroDivisionError", "unexpected")
    with pytest.raises(ZeroDivisionError):
        run("ls", tmp_path)


def test_the_log_of_attempts_is_printable():
    attempt = looping.Attempt(
        run="r", attempt=1, began=0.0, seconds=0.0, np=1, hosts=(TEXT,), code=1,
        outcome="failed", step_from=0, step_to=0, error=TEXT, left_out=(),
    )  # fmt: skip
    assert json_text(attempt.to_json(), indent=None).isprintable()


def test_a_terminal_gets_colours_and_nothing_else(tmp_path):
    root = dangerous_root(tmp_path / "c")
    for words in (["show", str(root)], ["ls", str(root), "--json"]):
        code, written = shown_in_terminal(words, 80)
        assert code == 0
        assert harmless(plain(written)), written


def test_terminals_that_know_ascii_only_are_no_crash(tmp_path, monkeypatch):
    publish(tmp_path, [ArrayState("重み" * 9, {"é": np.ones(1)})])
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, written = shown_in_terminal(["show", str(tmp_path)], 60)
    assert code == 0
    assert plain(written).isascii()
    assert "\\u91cd" in written
    assert "----" in written
    words = ["show", str(tmp_path), "--leaf", f"{'重み' * 9}/é"]
    drawn = plain(shown_in_terminal(words, 80)[1])
    assert "\\u25" not in drawn
    assert "  |0" in drawn
    assert "  +---" in drawn


def test_only_the_screen_prints():
    """Whatever a module of the command line prints itself would not be cleaned."""
    for path in Path(mpi_ckpt.cli.__file__).parent.glob("*.py"):
        if path.name in ("screen.py", "__init__.py"):
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        used = {ast.unparse(n) for n in nodes if isinstance(n, (ast.Name, ast.Attribute))}
        assert not used & {
            "print", "click.echo", "click.secho", "sys.stdout", "sys.stderr", "Console",
            "click.prompt", "click.confirm", "click.style",
        }, path  # fmt: skip
