"""Language models to audit: found, checked and loaded.

Any Hugging Face causal language model with safetensors weights, from a folder or the hub, goes
through transformers' Auto classes; recallzoo's own checkpoints do too. Code that comes with a
model is never run.
"""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recallzoo.errors import RecallzooError, StoreError, UserError
from recallzoo.evaluate.audit_options import DtypeName
from recallzoo.evaluate.audit_store import valid_name
from recallzoo.files import read_json
from recallzoo.mixers import require_named, stored_that_look_ahead
from recallzoo.result import PRETRAINING_RUN
from recallzoo.text import tokenizer_hash
from recallzoo.text._checksums import digest_of, sha256_of
from recallzoo.text.tokenizer import Encoder, load_encoder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "*.model",
              "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that was found, not loaded yet."""

    name: str
    path: str
    """As it was given."""
    folder: Path
    config: dict[str, Any]
    model_hash: str
    """Of config.json and the weights: equal for equal models."""
    encoder: Encoder
    """Its own tokenizer."""
    tokenizer_hashes: tuple[str, ...]
    """Of its tokenizer, as a file and as transformers loads it; the first is stored."""

    @property
    def max_positions(self) -> int | None:
        """Longest context, None where the architecture sets no limit."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
            if isinstance(self.config.get(key), int):
                return self.config[key]
        return None


def split_name(given: str) -> tuple[str, str]:
    """NAME=PATH or PATH -> name and path. The name is the path's last part unless given.

    >>> split_name("hub/pythia-70m")
    ('pythia-70m', 'hub/pythia-70m')
    """
    name, equals, path = given.partition("=")
    if not equals or not valid_name(name):
        path = given
        name = Path(given).resolve().name if Path(given).exists() else given.rsplit("/", 1)[-1]
        name = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "model"
    return name, path


def find_model(given: str) -> ModelSource:
    """Find a model, its tokenizer and checksums.

    given  a folder (of a model, or of a finished `recallzoo pretrain` run) or hub name, or
           NAME=FOLDER to call it something else.

    Raises UserError where there is none, it has no safetensors weights, no tokenizer, a mixer of
    its author's own whose file was not named, or a library is missing; StoreError for a damaged
    config.json.
    """
    require_libraries()
    name, path = split_name(given)
    folder = _folder_of(path)
    config = read_json(folder / "config.json", "copy or download the model again")
    if not isinstance(config, dict):
        raise StoreError(f"{folder / 'config.json'} holds no object: it is damaged.")
    _require_named_mixers(config, Path(path).expanduser())
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        raise UserError(
            f"{path} has no weights in safetensors"
            + (f", only {pickled[0]}, which is a pickle and could run code" if pickled else "")
            + ". Save the model again with save_pretrained(folder), which writes safetensors."
        )
    encoder, hashes = _tokenizer_of(folder, path)
    files = [folder / "config.json", *weights]
    return ModelSource(
        name=name,
        path=path,
        folder=folder,
        config=config,
        model_hash=digest_of([(file.name, sha256_of(file)) for file in files]),
        encoder=encoder,
        tokenizer_hashes=hashes,
    )


def require_libraries() -> None:
    """Raise UserError unless the libraries an audit needs are installed."""
    for library in ("transformers", "tokenizers"):
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"auditing a model needs {library}, which is not installed: "
                f"pip install 'recallzoo[text]'."
            )


def load_model(source: ModelSource, dtype: DtypeName, device: torch.device) -> nn.Module:
    """Load a model for evaluation.

    Raises UserError for an architecture that transformers does not know, or that needs code of
    its own; StoreError for weights that are damaged or do not fill the model.
    """
    import transformers
    from safetensors import SafetensorError

    import recallzoo.hub  # noqa: F401  the Auto classes then know recallzoo's models

    with quiet_transformers():
        try:
            auto: Any = transformers.AutoModelForCausalLM  # its stubs know no loading info
            model, info = auto.from_pretrained(
                source.folder,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told of below, and refused
            )
        except SafetensorError as error:
            raise StoreError(
                f"the weights of {source.path} are damaged ({error}). Copy or download them again."
            ) from error
        except _library_errors() as error:
            raise UserError(
                f"{source.path} could not be loaded as a causal language model: "
                f"{first_lines(error)} It wants an architecture that transformers has itself; code "
                f"that comes with a model is not run."
            ) from error
    problems = [
        f"{kind.replace('_', ' ')} such as {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    ]
    if problems:
        raise StoreError(
            f"the weights of {source.path} do not fill the model its config.json describes: "
            f"{'; '.join(problems)}. Parts of it would be random. Save the model again."
        )
    return model.eval().to(device)


def _library_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a config.json that holds other than it should."""
    from huggingface_hub.errors import StrictDataclassError

    return (ArithmeticError, AttributeError, ImportError, IndexError, KeyError, OSError,
            RuntimeError, TypeError, ValueError, StrictDataclassError)  # fmt: skip


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' bars, and its warnings about what is checked here anyway."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def bos_of(source: ModelSource) -> tuple[int, str]:
    """The model's beginning-of-text token: its id, and its text."""
    token = source.encoder.default_boundary("start")
    id_ = None if token is None else source.encoder.id_of(token)
    if id_ is None or token is None:
        raise UserError(
            f"--bos prepend, but the tokenizer of {source.path} names no beginning-of-text token "
            f"(bos_token in tokenizer_config.json). Use --bos none."
        )
    return id_, token


def adds_bos(source: ModelSource) -> bool:
    """Whether the model's tokenizer begins texts with BOS when it is used as it comes."""
    tokenizer = getattr(source.encoder, "tokenizer", None)
    token = source.encoder.default_boundary("start")
    if token is None or tokenizer is None or not hasattr(tokenizer, "to_str"):
        return False
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == source.encoder.id_of(token)


def looks_ahead(source: ModelSource) -> list[str]:
    """Mixers of the model that look ahead."""
    return stored_that_look_ahead(_described_mixers(source.config))


def require_context(source: ModelSource, context: int) -> None:
    """UserError if a model cannot see that many tokens."""
    most = source.max_positions
    if most is not None and context > most:
        raise UserError(
            f"{source.name} has positions for {most:,} tokens, the context is {context:,}. Use "
            f"--context {most} or less."
        )


def require_ids(source: ModelSource, model: nn.Module, largest_id: int) -> None:
    """UserError if the text has a token id that the model has no embedding for."""
    with_embeddings: Any = model
    size = with_embeddings.get_input_embeddings().weight.shape[0]
    if largest_id >= size:
        raise UserError(
            f"the text has token id {largest_id}, past the {size:,} ids of {source.name}. Its "
            f"tokenizer has more tokens than its weights: was the model trained with another one?"
        )


def _require_named_mixers(config: dict[str, Any], given: Path) -> None:
    is_run = (given / PRETRAINING_RUN).is_file()
    require_named(_described_mixers(config), given if is_run else None)


def _described_mixers(config: dict[str, Any]) -> Any:
    described = config.get("model") if config.get("model_type") == "recallzoo" else None
    return described.get("mixers") if isinstance(described, dict) else None


def _folder_of(path: str) -> Path:
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if (folder / PRETRAINING_RUN).is_file():
        if (folder / "model" / "config.json").is_file():
            return folder / "model"
        raise UserError(
            f"{path} is a pretraining run without a model (it is not finished, or --no-export left "
            f"it out). Make one of its last checkpoint: recallzoo export {path} --out FOLDER "
            f"--data DATA, and audit FOLDER."
        )
    if folder.exists():
        raise UserError(
            f"{path} is no model: it has no config.json. A folder that save_pretrained wrote is "
            f"wanted (config.json, *.safetensors, tokenizer.json)."
        )
    if not _HUB_NAME.fullmatch(path):
        raise UserError(f"there is no model folder {path}, and it is no name on the hub either.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"there is no folder {path}, and no model of that name came from the Hugging Face hub: "
            f"{first_lines(error)} Give a folder that save_pretrained wrote, or try again with a "
            f"network."
        ) from error


def _tokenizer_of(folder: Path, path: str) -> tuple[Encoder, tuple[str, ...]]:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{path} has no tokenizer, so nothing says what its ids mean. Copy tokenizer.json and "
            f"tokenizer_config.json there; of a model trained on data of recallzoo prepare, they "
            f"are in DATA/tokenizer."
        )
    encoder = load_encoder(str(folder))
    hashes = [encoder.hash]
    try:
        from transformers import AutoTokenizer

        import recallzoo.hub  # noqa: F401  else its exports count as models with code of their own

        # Some classes change a tokenizer while loading it; `prepare` may have been given a name.
        with quiet_transformers():
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            hashes.append(tokenizer_hash(loaded))
    except (RecallzooError, *_library_errors()):
        pass  # the file alone then says which tokenizer it is
    return encoder, tuple(dict.fromkeys(hashes))


def first_lines(error: Exception) -> str:
    """The message of a library's error, shortened, as a sentence."""
    text = " ".join(str(error).split())
    return (
        (text[:300] + " ...")
        if len(text) > 300
        else (text or type(error).__name__) + ("" if text.endswith(".") else ".")
    )
