"""What is opened lies beneath a root, whatever is exchanged between the look and the opening."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from loramux.errors import InvalidAdapter, LoramuxError, PathNotAllowed
from loramux.lora import beneath
from loramux.lora.beneath import FILE, FOLDER, LINK_ERRORS, open_beneath, walk_beneath
from loramux.lora.folder import AdapterFolder
from loramux.lora.limits import ReadLimits
from loramux.lora.roots import CONFIG_FILE, WEIGHTS_FILE, AdapterRoots
from loramux.lora.snapshot import folder_digest

LIMITS = ReadLimits()
INSIDE, OUTSIDE = b"inside", b"a secret"
Open = Callable[[int, str, int], int]


@pytest.fixture(params=["openat2", "component by component"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test by the kernel's call and without it."""
    if request.param != "openat2":
        monkeypatch.setattr(beneath, "_libc", None)
    elif beneath._libc is None:
        pytest.skip("no openat2 here")
    return str(request.param)


def put(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / WEIGHTS_FILE).write_bytes(content)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "root/team/a", INSIDE)
    put(tmp_path / "secret/a", OUTSIDE)
    return tmp_path / "root"


@pytest.fixture
def roots(root: Path) -> AdapterRoots:
    return AdapterRoots([root])


def exchange(path: Path, target: Path) -> None:
    """A link to `target` where `path` was."""
    path.rename(path.with_name(f".{path.name}"))
    path.symlink_to(target)


def test_what_is_beneath_is_opened(root: Path) -> None:
    folder = os.open(root, FOLDER)
    try:
        for path in ("team/a", "./team//a/", "."):
            os.close(open_beneath(folder, path, FOLDER))
        file = open_beneath(folder, f"team/a/{WEIGHTS_FILE}", FILE)
        assert os.read(file, 100) == INSIDE
        os.close(file)
    finally:
        os.close(folder)


@pytest.mark.parametrize("path", ["link", "link/a", "../secret", "..", "/etc", "team/a/file", "loop"])
def test_a_link_or_a_way_up_is_not_opened(root: Path, path: str) -> None:
    (root / "link").symlink_to("team")
    (root / "loop").symlink_to("loop")
    (root / "team/a/file").symlink_to(WEIGHTS_FILE)
    folder = os.open(root, FOLDER)
    try:
        for opening in (open_beneath, walk_beneath):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is asserted below
                os.close(opening(folder, path, FILE))
            assert caught.value.errno in LINK_ERRORS
    finally:
        os.close(folder)


def test_no_descriptor_is_left(root: Path, roots: AdapterRoots) -> None:
    (root / "team/a" / CONFIG_FILE).rename(root / "config")
    (root / "team/a" / CONFIG_FILE).symlink_to(root / "config")
    before = len(os.listdir("/proc/self/fd"))
    folder = roots.resolve("team/a")
    folder_digest(folder, LIMITS)
    (root / "config").unlink()
    for broken in (folder, AdapterFolder(root / "nowhere", folder.roots)):
        with pytest.raises(InvalidAdapter):
            folder_digest(broken, LIMITS)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("part", ["team/a", "team", "."])
def test_a_folder_exchanged_after_the_look(root: Path, roots: AdapterRoots, part: str) -> None:
    folder = roots.resolve("team/a")
    (root.parent / "secret/team").mkdir()
    put(root.parent / "secret/team/a", OUTSIDE)
    exchange((root / part).resolve(), root.parent / "secret" / part)
    with pytest.raises(LoramuxError) as caught:
        folder_digest(folder, LIMITS)
    assert caught.value.reason in ("ADAPTER_FILES_CHANGED", "ADAPTER_FILES_UNREADABLE")


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_exchanged_after_the_look(root: Path, roots: AdapterRoots, file: str) -> None:
    folder = roots.resolve("team/a")
    exchange(root / "team/a" / file, root.parent / "secret/a" / file)
    with pytest.raises(PathNotAllowed, match="outside the adapter roots"):
        folder_digest(folder, LIMITS)


def test_both_files_are_of_one_folder(root: Path, roots: AdapterRoots) -> None:
    """One that is replaced between the two openings is read as it was, not half and half."""
    folder = roots.resolve("team/a")
    put(root / "team/b", b"another version")
    with folder.opened() as opened:
        (root / "team/a").rename(root / "team/old")
        (root / "team/b").rename(root / "team/a")
        file = opened.open(WEIGHTS_FILE)
        assert os.read(file, 100) == INSIDE
        os.close(file)


@pytest.mark.parametrize("absolute", [True, False])
def test_links_within_the_roots_work(root: Path, roots: AdapterRoots, absolute: bool) -> None:
    """The Hugging Face cache: snapshots/REVISION/FILE leads to ../../blobs/HASH."""
    expected = folder_digest(roots.resolve("team/a"), LIMITS)
    snapshot, blobs = root / "models--acme--sql/snapshots/1", root / "models--acme--sql/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((CONFIG_FILE, WEIGHTS_FILE)):
        (root / "team/a" / file).rename(blobs / str(i))
        (snapshot / file).symlink_to(blobs / str(i) if absolute else f"../../blobs/{i}")
    (root / "named").symlink_to("models--acme--sql/snapshots/1")
    for source in ("models--acme--sql/snapshots/1", "named", str(root / "named")):
        assert folder_digest(roots.resolve(source), LIMITS) == expected
    assert folder_digest(AdapterRoots([root / "models--acme--sql"]).resolve("snapshots/1"), LIMITS) == expected


def test_a_link_into_another_root_works(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "other/b", INSIDE)
    (root / "b").symlink_to("../other/b")
    folder_digest(AdapterRoots([root, tmp_path / "other"]).resolve("b"), LIMITS)
    with pytest.raises(PathNotAllowed):
        AdapterRoots([root]).resolve("b")


@pytest.mark.parametrize("target", [WEIGHTS_FILE, "nowhere", "../a"])
def test_a_file_that_leads_in_a_circle_or_nowhere_is_told(root: Path, roots: AdapterRoots, target: str) -> None:
    (root / "team/a" / WEIGHTS_FILE).unlink()
    (root / "team/a" / WEIGHTS_FILE).symlink_to(target)
    with pytest.raises(InvalidAdapter) as caught:
        folder_digest(roots.resolve("team/a"), LIMITS)
    assert caught.value.reason in ("ADAPTER_FILES_MISSING", "ADAPTER_FILES_UNREADABLE")


def test_without_a_stop_exchanged_for_a_link(root: Path, roots: AdapterRoots) -> None:
    """As much as one can try: whatever is answered, it is never of the folder outside, and always of ours."""
    inner, link = root / "team/a", root / "team/.link"
    forbidden = folder_digest(root.parent / "secret/a", LIMITS)
    link.symlink_to(root.parent / "secret/a")
    over = threading.Event()

    def swap() -> None:
        aside = root / "team/.aside"
        while not over.is_set():
            inner.rename(aside)
            link.rename(inner)
            inner.rename(link)
            aside.rename(inner)

    thread = threading.Thread(target=swap)
    thread.start()
    seen: Counter[str] = Counter()
    try:
        for _ in range(500):
            try:
                seen["outside" if folder_digest(roots.resolve("team/a"), LIMITS) == forbidden else "inside"] += 1
            except LoramuxError as error:
                seen[error.reason] += 1
    finally:
        over.set()
        thread.join()
    assert not seen["outside"], seen


def test_a_root_that_is_not_there_is_told_before_anything_else(root: Path) -> None:
    AdapterRoots([root]).check()
    for path in (root / "nowhere", root / "team/a" / CONFIG_FILE):
        with pytest.raises(LoramuxError, match=f"--adapter-dir {path}"):
            AdapterRoots([root, path]).check()
