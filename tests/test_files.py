"""Files and folders are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import StoreError, UserError
from recallzoo.files import (
    atomic_file,
    atomic_folder,
    exclusive,
    explain_os_error,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)

pytestmark = pytest.mark.usefixtures("real_fsync")
DEAD = 2**22 + 1
"""Above Linux's largest process id."""


class Broken(Exception):
    """Stands for whatever may happen while a file is written."""


def leave_half(path: Path) -> None:
    path.write_text("half")
    raise Broken


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(json_values)
def test_json_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "folder" / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@given(st.text())
def test_text_is_written_as_utf8(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text"
    write_text(path, text.replace("\r", ""))
    assert path.read_bytes().decode() == text.replace("\r", "")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_has_no_word_for_is_refused_and_the_old_content_kept(tmp_path, number):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": number})
    assert read_json(path) == 1


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    with pytest.raises(Broken), atomic_file(path) as temporary:
        leave_half(temporary)
    assert (path.read_text() if path.exists() else None) == old
    assert list(tmp_path.iterdir()) == ([path] if old else [])


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename is atomic within one file system alone"
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_was_never_written_is_an_error(tmp_path):
    with (
        pytest.raises(StoreError, match=r"could not write .*/file: No such file"),
        atomic_file(tmp_path / "file"),
    ):
        pass
    assert not (tmp_path / "file").exists()


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "runs" / "abc"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
        assert not path.exists()
    assert sorted(p.name for p in path.rglob("*")) == ["a", "b", "sub"]
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_whose_writing_fails_is_absent(tmp_path):
    with pytest.raises(Broken), atomic_folder(tmp_path / "abc") as temporary:
        leave_half(temporary / "a")
    assert list(tmp_path.iterdir()) == []


def test_of_two_folders_of_one_name_the_first_is_kept(tmp_path):
    path = tmp_path / "abc"
    with atomic_folder(path) as ours:
        (ours / "from").write_text("ours")
        with atomic_folder(path) as theirs:
            (theirs / "from").write_text("theirs")
    assert (path / "from").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_when_the_new_one_is_whole_and_not_before(tmp_path):
    path = tmp_path / "abc"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(Broken), atomic_folder(path, replace=True) as temporary:
        leave_half(temporary / "new")
    assert [p.name for p in path.iterdir()] == ["old"]
    with atomic_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_place_that_is_no_folder_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    words = r"could not write .*/file/abc: .*finished before is kept"
    with pytest.raises(StoreError, match=words), write(tmp_path / "file" / "abc") as temporary:
        temporary.write_text("")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full. Free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission to write there. Choose another folder"),
        (errno.EROFS, "no permission to write there"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
@pytest.mark.parametrize("library", ["python", "rust"])
def test_an_error_of_the_system_becomes_a_message(tmp_path, number, words, library):
    error = OSError(number, os.strerror(number))
    if library == "rust":  # as safetensors and polars raise it
        error = RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    with pytest.raises(StoreError) as explained, atomic_file(tmp_path / "file"):
        raise error
    assert words in str(explained.value)
    assert str(tmp_path / "file") in str(explained.value)
    assert explained.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_the_write_is_told_even_if_nothing_can_be_cleaned_up(tmp_path, monkeypatch):
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(StoreError, match="no permission"), atomic_file(tmp_path / "file"):
        read_only()


def test_an_error_without_a_number_is_told_in_its_own_words():
    message = str(explain_os_error(OSError("the cable is out"), Path("x")))
    assert message == "could not write x: the cable is out. What was finished before is kept."


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}x', b"\xff\xfe", b"\x00" * 9])
def test_damaged_json_is_named_with_the_way_out(tmp_path, content):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(StoreError) as error:
        read_json(path)
    assert f"{path} is not valid JSON" in str(error.value)
    assert "delete it" in str(error.value)


def test_json_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"could not read .*/none.json: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(StoreError, match="could not read"):
        read_json(tmp_path)


def test_leftovers_of_dead_processes_go_and_all_else_stays(tmp_path):
    gone = [f".tmp-a-{DEAD}-01234567", f".tmp-run-1-with-dashes-{DEAD}-01234567", ".tmp-odd"]
    kept = [f".tmp-a-{os.getpid()}-01234567", f".tmp-a-{1}-01234567", "tmp-a", ".other", "run"]
    for name in gone + kept:
        if "a" in name:
            (tmp_path / name).mkdir()
            (tmp_path / name / "inside").write_text("")
        else:
            (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == len(gone)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert remove_leftovers(tmp_path) == 0
    assert remove_leftovers(tmp_path / "absent") == 0


def test_a_process_killed_while_it_writes_leaves_the_old_content_and_one_leftover(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, "old")
    code = (
        "import os, pathlib, signal, sys\n"
        "from recallzoo.files import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert json.loads(path.read_text()) == "old"
    assert remove_leftovers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_once_and_free_again_afterwards(tmp_path):
    lock = tmp_path / "folder" / "lock"
    for _ in range(2):
        with exclusive(lock, "somebody is at work"):
            code = (
                "from pathlib import Path; from recallzoo.files import exclusive\n"
                f"with exclusive(Path({str(lock)!r}), 'somebody is at work'): pass"
            )
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert "UserError: somebody is at work" in other.stderr
            with pytest.raises(UserError, match="somebody"), exclusive(lock, "somebody is at work"):
                pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with exclusive(tmp_path / "lock", "busy"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
    lines = []
    with exclusive(tmp_path / "lock", "busy", lines.append):
        assert len(lines) == 1


def test_a_place_where_no_lock_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match="could not write"),
        exclusive(tmp_path / "file" / "lock", "busy"),
    ):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_can_be_read_by_those_whom_the_mask_lets_whatever_library_wrote_them(tmp_path, mask):
    code = (
        "import os, pathlib, sys, torch\n"
        f"os.umask({mask})\n"
        "from safetensors.torch import save_file\n"
        "from recallzoo.files import atomic_file, atomic_folder\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with atomic_file(folder / 'one') as one:\n"
        "    save_file({'x': torch.ones(2)}, one)\n"
        "with atomic_folder(folder / 'model') as model:\n"
        "    save_file({'x': torch.ones(2)}, model / 'two')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for path in (tmp_path / "one", tmp_path / "model" / "two"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
