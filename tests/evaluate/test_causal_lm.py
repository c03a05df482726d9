"""Models to audit: what stands for one, and whose code is not run."""

import json
import shutil
from pathlib import Path

import pytest

from recallzoo.errors import UserError
from recallzoo.evaluate.causal_lm import find_model
from tests.evaluate.making import make_byte_tokenizer, make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "made", make_byte_tokenizer(folder / "bytes"), 1)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tokenizer_file", ["tokenizer.json", "vocab.json"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tokenizer_file, made, tmp_path, monkeypatch
):
    model = tmp_path / "own"
    shutil.copytree(made, model)
    (model / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Own: ...\n")
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    if tokenizer_file == "tokenizer.json":
        assert find_model(str(model)).name == "own"
    else:
        (model / "tokenizer.json").unlink()
        (model / tokenizer_file).write_text("{}")
        with pytest.raises(UserError, match="no tokenizer could be loaded"):
            find_model(str(model))
    assert asked == []
    assert not (tmp_path / "was_run").exists()


def test_the_folder_of_a_pretraining_run_stands_for_its_model(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run / "model")
    (run / "pretrain.json").write_text("{}")
    found = find_model(str(run))
    assert found.name == "run"
    assert found.model_hash == find_model(str(made)).model_hash
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match=r"not finished.*recallzoo export .*run --out FOLDER"):
        find_model(str(run))
