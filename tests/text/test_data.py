"""Contexts cut from the stream."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig, UserError
from recallzoo.text import open_data
from tests.text.shards import write_data

LENGTHS = [1, 30, 4, 4, 17, 1, 9, 64]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    documents = [np.arange(n) + 100 * i for i, n in enumerate(LENGTHS)]
    folder = tmp_path_factory.mktemp("data") / "data"
    return write_data(folder, documents, 1000, shard_tokens=40).split("train")


def stream(split) -> tuple[np.ndarray, np.ndarray]:
    documents = [split.document(i) for i in range(split.num_documents)]
    ids = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])
    return np.concatenate(documents), ids


@given(st.integers(0, 130), st.integers(0, 130))
def test_any_range_can_be_read_over_shards(split, a, b):
    start, stop = sorted((a, b))
    assert len(list(split.shards())) > 2
    assert split.read(start, stop).tolist() == stream(split)[0][start:stop].tolist()


@given(
    seq_len=st.integers(1, 200),
    stride=st.integers(1, 200),
    document_aligned=st.booleans(),
)
def test_contexts_cover_every_token_once_as_new(split, seq_len, stride, document_aligned):
    stride = min(stride, seq_len)
    contexts = split.contexts(seq_len, stride=stride, document_aligned=document_aligned)
    batch = contexts.batch(range(len(contexts)))
    tokens, ids = stream(split)
    assert batch.tokens[batch.is_new].tolist() == tokens.tolist()
    assert batch.document_ids[batch.is_new].tolist() == ids.tolist()
    padded = batch.document_ids < 0
    assert not (batch.is_new & padded).any()
    assert not batch.tokens[padded].any()
    for row, (start, stop) in enumerate(zip(contexts.starts, contexts.stops, strict=True)):
        assert batch.tokens[row, : stop - start].tolist() == tokens[start:stop].tolist()
        assert batch.document_ids[row, : stop - start].tolist() == ids[start:stop].tolist()
    if document_aligned:
        assert all(len(row[row >= 0].unique()) == 1 for row in batch.document_ids)
    elif stride == seq_len:
        assert len(contexts) == -(-len(tokens) // seq_len)


@given(seq_len=st.integers(1, 140))
def test_dropping_the_partial_context_leaves_only_full_ones(split, seq_len):
    contexts = split.contexts(seq_len + 1, stride=seq_len, partial="drop")
    batch = contexts.batch(range(len(contexts)))
    assert len(contexts) == max(0, (split.num_tokens - 1) // seq_len)
    assert (batch.document_ids >= 0).all()


def test_batches_are_the_rows_asked_for(split):
    contexts = split.contexts(10)
    whole = contexts.batch(range(len(contexts)))
    some = contexts.batch([3, 0, 3])
    assert torch.equal(some.tokens, whole.tokens[[3, 0, 3]])


@pytest.mark.parametrize(
    "call",
    [
        lambda split: split.contexts(0),
        lambda split: split.contexts(8, stride=9),
        lambda split: split.contexts(8, document_aligned=True, partial="drop"),
        lambda split: split.document(len(LENGTHS)),
        lambda split: split.read(5, 10**6),
    ],
)
def test_impossible_cuts_are_refused(split, call):
    with pytest.raises(InvalidConfig):
        call(split)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="no prepared data"):
        open_data(tmp_path)


def test_reading_counting_and_labelling_need_numpy_and_torch_alone(split, tmp_path):
    script = (
        "import sys\n"
        "absent = 'tokenizers transformers datasets polars zstandard pyarrow tqdm'.split()\n"
        "for name in absent:\n"
        "    sys.modules[name] = None\n"
        "from recallzoo.text import open_data, label_pairs\n"
        f"data = open_data({str(split.data.folder)!r}, verify=True)\n"
        "batch = data.split('train').contexts(16).batch([0, 1])\n"
        "from recallzoo.text.counting import count_pairs\n"
        f"count_pairs(data, folder={str(tmp_path / 'table')!r}, progress=False)\n"
        "label_pairs(batch.tokens, {(1, 2): 3}, document_ids=batch.document_ids)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
