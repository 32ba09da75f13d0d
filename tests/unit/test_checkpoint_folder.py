"""The folder of checkpoints: names, what is kept, what is set aside, what is never picked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsync.checkpoint import folder, reader


@given(st.sets(st.integers(0, 500)), st.integers(0, 5), st.integers(0, 50))
def test_what_is_kept(steps: set[int], keep: int, every: int) -> None:
    gone = folder.superfluous(sorted(steps), keep, every)
    left = steps - set(gone)
    assert set(gone) <= steps
    if keep == 0:
        assert not gone
    else:
        assert set(sorted(steps)[-keep:]) <= left
        assert all(step % every for step in gone if every)
        assert len(left - {step for step in steps if every and step % every == 0}) <= keep


def test_names() -> None:
    assert folder.step_name(100) == "step-00000100"
    assert folder.step_of("step-00000100") == 100
    assert folder.step_of(folder.step_name(10**9)) == 10**9
    for name in ("step-100", "step-000000100", ".step-00000100.tmp", "step-00000100.damaged", "x"):
        assert folder.step_of(name) is None
    assert folder.data_file(3) == "rank-00003.h5"
    assert folder.data_file(3, of_nodes=True) == "node-00003.h5"


def test_only_final_names_are_found(tmp_path: Path) -> None:
    for name in ("step-00000100", ".step-00000300.tmp", "step-00000200", "step-00000400.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000500").touch()
    (tmp_path / "step-00000600").symlink_to("step-00000100")
    assert folder.steps(tmp_path) == [100, 200]
    assert reader.find(tmp_path) == [tmp_path / "step-00000200", tmp_path / "step-00000100"]
    assert reader.find(tmp_path / "none") == []


def test_latest(tmp_path: Path) -> None:
    assert folder.latest(tmp_path) is None
    for step in (100, 200):
        folder.set_latest(tmp_path, step)
        assert folder.latest(tmp_path) == folder.step_name(step)
    (tmp_path / "latest").write_text("../../elsewhere")
    assert folder.latest(tmp_path) is None


def test_prune_removes_what_is_superfluous(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        (tmp_path / folder.step_name(step)).mkdir()
    assert folder.prune(tmp_path, keep=1, keep_every=20) == [10, 30]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000020", "step-00000040"]


def test_clean_removes_what_was_half_written_and_nothing_else(tmp_path: Path) -> None:
    kept = {"step-00000100", "step-00000200.damaged", "mine", ".mine.tmp"}
    gone = {".step-00000300.tmp", ".step-00000300-2.tmp"}
    for name in kept | gone:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".latest.tmp").touch()
    (tmp_path / ".step-00000400.tmp").symlink_to("mine")
    assert set(folder.clean(tmp_path)) == gone | {".latest.tmp", ".step-00000400.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "mine" / "file").exists()
    assert folder.clean(tmp_path / "none") == []


def test_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        (tmp_path / "step-00000100").mkdir()
        names.append(folder.set_aside(tmp_path / "step-00000100").name)
    assert names == ["step-00000100.damaged", "step-00000100.damaged-2"]
    assert folder.steps(tmp_path) == []


def test_publish_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    final = tmp_path / "step-00000100"
    for text in ("old", "new"):
        fresh = folder.aside(tmp_path, 100)
        fresh.mkdir()
        (fresh / "file").write_text(text)
        folder.publish(fresh, final)
        assert (final / "file").read_text() == text
    assert list(tmp_path.iterdir()) == [final]


def test_the_entry_of_the_folder_of_checkpoints_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / folder.FOLDER
    fresh, final = folder.aside(checkpoints, 100), checkpoints / folder.step_name(100)
    fresh.mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(folder, "sync_folder", synced.append)
    folder.publish(fresh, final)
    assert synced == [fresh, checkpoints, tmp_path]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("last", range(1, 6))
def test_one_that_is_replaced_is_lost_at_no_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Killed before any call: the next run has the old one or the new one, whole."""
    checkpoints = tmp_path / folder.FOLDER
    fresh, final = folder.aside(checkpoints, 100), checkpoints / folder.step_name(100)
    for path in (fresh, final):
        path.mkdir(parents=True)
        (path / "file").write_text("new" if path == fresh else "old")
    rename, left = os.rename, last

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def inner(*arguments: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _Killed
            call(*arguments)

        return inner

    def tears(path: Path) -> None:
        (path / "file").write_text("torn")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted(rename))
        patch.setattr(folder.shutil, "rmtree", counted(tears))
        with contextlib.suppress(_Killed):
            folder.publish(fresh, final)
    folder.clean(checkpoints)
    assert list(checkpoints.iterdir()) == [final]
    assert (final / "file").read_text() == ("old" if last <= 2 else "new")


def test_one_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / folder.step_name(100)
    final.mkdir()
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if source == tmp_path / "fresh":
            raise OSError(5, "planted")
        rename(source, target)

    (tmp_path / "fresh").mkdir()
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="planted"):
        folder.publish(tmp_path / "fresh", final)
    assert final.exists()


def test_remove_takes_a_half_written_one(tmp_path: Path) -> None:
    fresh = folder.aside(tmp_path, 100)
    fresh.mkdir()
    (fresh / "file").touch()
    folder.remove(fresh)
    with pytest.raises(FileNotFoundError):
        folder.remove(fresh)
