"""Files and folders: whole or not at all, of one writer, in the place of nothing but files."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from vitreous import VitreousError
from vitreous.files import MANIFEST, check, folder_aside, sweep, writable, write_whole
from vitreous.files.folders import folder, locked
from vitreous.files.writing import _aside


def everything(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*") if p.is_file()}


def test_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "x", [letter * 300_000 for letter in "abcdefgh"]
    errors: list[BaseException] = []
    seen: set[str] = set()

    def write(content: str) -> None:
        try:
            for _ in range(20):
                write_whole(path, content)
                seen.add(path.read_text())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(c,)) for c in contents]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and seen <= set(contents) and list(tmp_path.iterdir()) == [path]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    kinds = {"folder": "a folder", "dangling": "link to nothing", "loop": "link to nothing"}
    kinds |= {"pipe": "a pipe", "device": "a device", "socket": "a socket"}
    for name, why in kinds.items():
        before = os.lstat(tmp_path / name)
        for attempt in (lambda p: write_whole(p, b"x"), lambda p: writable(p, overwrite=True)):
            with pytest.raises(VitreousError, match=why):
                attempt(tmp_path / name)
        after = os.lstat(tmp_path / name)
        assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert {p.name for p in tmp_path.iterdir()} == kinds.keys()


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "é" * 200, "absent/x", "file/x"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (lambda: write_whole(tmp_path / name, b""), lambda: writable(tmp_path / name)):
        with pytest.raises(VitreousError, match="cannot write"):
            attempt()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_whole(writable(path), "here")
    assert path.read_text() == "here"


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            _aside(tmp_path / "x").write_text("half")
            with folder_aside(tmp_path / "x") as aside:
                (aside / "half").write_text("half")
                os.write(tell, b".")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"."
    sweep(tmp_path / "x")
    assert len(list(tmp_path.iterdir())) == 2, "its writer lives"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    sweep(tmp_path / "other")
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(tmp_path / "x", "whole")
    assert everything(tmp_path) == {"x": "whole"}


def test_a_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    with folder(tmp_path / "out", False) as (aside, target):
        (aside / "a").write_text("1")
        assert not target.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"} and {p.name for p in target.iterdir()} == {"a", MANIFEST}
    check(target / "a")
    (target / "a").write_text("2")
    with pytest.raises(VitreousError, match="not the file that was written"):
        check(target / "a")
    write_whole(target / "a", "3")  # on purpose
    check(target / "a")
    with pytest.raises(ZeroDivisionError), folder(tmp_path / "other", False) as (aside, _):
        (aside / "a").write_text("1")
        raise ZeroDivisionError
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_overwriting_replaces_one_run_by_another_and_leaves_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder(out, False) as (aside, _):
        (aside / "a").write_text("old")
        (aside / "b").write_text("old")
    (out / "mine" / "deep").mkdir(parents=True)
    (out / "mine" / "deep" / "file").write_text("mine")
    (out / "link").symlink_to("mine")
    with pytest.raises(VitreousError, match="not empty"), folder(out, False):
        pass
    with folder(out, True) as (aside, _):
        (aside / "a").write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {k: v for k, v in everything(out).items() if k != MANIFEST} == {"a": "new", "mine/deep/file": "mine"}
    assert (out / "link").is_symlink() and json.loads((out / MANIFEST).read_text())["files"].keys() == {"a"}


def test_overwriting_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder(tmp_path / "out", False) as (aside, _):
        (aside / "a").write_text("old")
        (aside / "b").write_text("old")
    (tmp_path / "out" / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "out")
    with folder(Path("."), True) as (aside, _):
        (aside / "a").write_text("new")
    assert Path("a").read_text() == "new" and Path("mine").exists() and not Path("b").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out"} and {p.name for p in Path().iterdir()} == {"a", "mine", MANIFEST}


def dies_at(n: int, out: Path, where: str) -> int:
    """In a process of its own: overwrite `out`, and die at the n-th change of a name."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = n

    def counted(real: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)

        return call

    for name in ("replace", "rename", "unlink", "link", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        if where == "inside":
            os.chdir(out)
        with folder(out, True) as (aside, _):
            for name in "abc":
                (aside / name).write_text("new")
    finally:
        os._exit(0)


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_killed_at_any_change_an_overwrite_never_mixes(where: str, tmp_path: Path) -> None:
    for n in range(60):
        out = tmp_path / str(n) / "out"
        with folder(out, False) as (aside, _):
            for name in "abc":
                (aside / name).write_text("old")
        (out / "mine").write_text("mine")
        status = dies_at(n, out, where)
        said = everything(out)
        texts = {said[name] for name in "abc" if name in said}
        assert len(texts) <= 1 and said["mine"] == "mine", (n, said)
        if where == "beside":
            assert all(name in said for name in "abc"), (n, said)
        if status == 0:
            assert n > 5 and texts == {"new"}
            return
        with folder(out, True) as (aside, _):  # and the next run finds nothing in its way
            (aside / "a").write_text("next")
        assert {p.name for p in out.parent.iterdir()} == {"out"}
        assert {"a", "mine", MANIFEST} <= {p.name for p in out.iterdir()}
    raise AssertionError("never came to an end")


def test_two_runs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with folder(Path("out"), False) as (aside, _):
        (aside / "a").write_text("first")
        for overwrite in (False, True):
            with pytest.raises(VitreousError, match="another run is at work"), folder(Path("out"), overwrite):
                pass
        with folder(None, False) as (_, one), folder(None, False) as (_, two):
            assert (one.name, two.name) == ("vitreous-out", "vitreous-out-2")
    assert Path("out/a").read_text() == "first"
    with locked(Path("kept")), pytest.raises(VitreousError, match="another --resume"), locked(Path("kept"), "--resume"):
        pass
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["file", "dangling", "pipe", "under a file", "nul", "long", "holds a pipe"])
def test_folders_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "holder").mkdir()
    os.mkfifo(tmp_path / "holder" / "a")
    places = {"under a file": "file/out", "nul": "a\0b", "long": "x" * 300, "holds a pipe": "holder"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VitreousError), folder(tmp_path / places.get(kind, kind), True):
        raise AssertionError("the work must not begin")
    assert sorted(tmp_path.rglob("*")) == before
