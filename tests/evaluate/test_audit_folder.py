"""An audit's folder: one process at a time, however the one before it ended."""

import errno

import pytest
from forks import Forked

from recallzoo import files as files_module
from recallzoo.errors import StoreError, UserError
from recallzoo.evaluate import audit as audit_module
from recallzoo.evaluate.token_losses import TokenLosses
from recallzoo.files import LOCK_FILE
from tests.evaluate.auditing import run

KILLED = """
import os, signal, sys
from pathlib import Path
from recallzoo.evaluate.token_losses import TokenLosses
from tests.evaluate.auditing import run

TokenLosses.of = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_audit_into_the_folder_is_refused(overwrite, here, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if overwrite:
        run(here, out, context=16)
    losses_of, refused = TokenLosses.of, []

    def meanwhile(self, part):
        for other in ({}, {"context": 16, "overwrite": True}):
            with pytest.raises(UserError, match=r"another process is auditing into .* Wait for it"):
                run(here, out, "b", **other)
            refused.append(other)
        return losses_of(self, part)

    monkeypatch.setattr(TokenLosses, "of", meanwhile)
    assert run(here, out, overwrite=overwrite).models == ("a",)
    assert len(refused) >= 2
    monkeypatch.undo()
    assert run(here, out, "b").models == ("b",)  # an audit that ended lets go


@pytest.mark.unchecked
def test_a_killed_audit_holds_the_folder_no_longer(here, tmp_path):
    killed = Forked(KILLED, here, tmp_path / "out")
    assert killed.wait() == -9, killed.err
    assert (tmp_path / "out" / LOCK_FILE).exists()
    assert run(here, tmp_path / "out").models == ("a",)


def test_a_folder_that_an_audit_was_killed_in_before_it_wrote_is_taken(here, tmp_path):
    (tmp_path / LOCK_FILE).touch()
    assert run(here, tmp_path).models == ("a",)


def test_a_folder_of_something_else_gets_no_lock(here, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no audit"):
        run(here, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_replacing_that_is_broken_off_leaves_an_audit_that_can_be_replaced(
    here, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run(here, out, context=16)

    def broken_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(audit_module.shutil, "rmtree", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(here, out, overwrite=True)
    assert run(here, out, overwrite=True).about["context"] == 32


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_program_calls_its_settings_is_not_touched(overwrite, here, tmp_path):
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 14, "context": 32}')
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="is no audit"):
        run(here, tmp_path, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "settings.json"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_replacing_an_audit_keeps_what_is_not_of_it(is_damaged, here, tmp_path):
    out = tmp_path / "out"
    run(here, out, context=16)
    (out / "notes.md").write_text("mine")
    (out / "report").mkdir()
    (out / "report" / "report.html").write_text("of another audit")
    if is_damaged:
        (out / "settings.json").write_text("{")
    assert run(here, out, overwrite=True).about["context"] == 32
    assert (out / "notes.md").read_text() == "mine"
    assert not (out / "report").exists()


def test_damaged_settings_are_named_and_the_way_out_works(here, tmp_path):
    out = tmp_path / "out"
    run(here, out)
    (out / "settings.json").write_text("{")
    with pytest.raises(StoreError, match=r"settings\.json is not valid .* give --overwrite"):
        run(here, out)
    assert run(here, out, overwrite=True).about["context"] == 32


def test_an_audit_that_may_not_be_changed_is_named(here, tmp_path, monkeypatch):
    run(here, tmp_path / "out", context=16)

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files_module.shutil, "rmtree", refuse)  # root may do all
    with pytest.raises(StoreError, match="no permission to write there"):
        run(here, tmp_path / "out", overwrite=True)
