"""Real text: corpora, tokenizers, shards, pair counts and AR-hit labels.

A prepared data folder is made by `prepare(PrepareOptions(...))` (`recallzoo prepare`):

    DATA/
      manifest.json             written last: a folder without it is unfinished
      tokenizer/                tokenizer.json and tokenizer_config.json, as transformers loads them
      train/ valid/ test/       one folder a split that was asked for
        tokens-00000.npy ...    uint16 or uint32 [tokens of the shard]; a document is in one shard
        document_offsets.npy    int64 [documents + 1], into the split's whole token stream
        document_domains.npy    uint16 [documents], index into the manifest's `domains`
        document_bytes.npy      int64 [documents], UTF-8 bytes of the text (for bits per byte)
        documents.parquet       id, domain, source, num_tokens, num_bytes; rows as above
      pair_counts/              exact counts of adjacent pairs of the training split
        pairs.npy counts.npy pair_counts.json

Documents stand in an order drawn by a hash of their ids. A document's tokens include its
boundary token (by default `<|endoftext|>` at its end), which is all that separates documents.

    data = open_data("DATA")                   # sizes checked; verify=True reads every checksum
    data.tokenizer_hash, data.vocab_size, data.domains, data.boundary
    valid = data.split("valid")
    valid.num_tokens, valid.num_documents, valid.document_offsets, valid.document_domains
    valid.read(start, stop)                    # any range of the stream, over shards
    contexts = valid.contexts(2048)            # packed; document_aligned=True for one document each
    batch = contexts.batch(range(8))           # tokens [B, T], document_ids [B, T] (-1 is padding)
    counts = data.pair_counts()                # PairCounts: lookup(first, second) on CPU or GPU
    labels = label_pairs(batch.tokens, counts, document_ids=batch.document_ids)
    hits = label_ar_hits(batch.tokens, counts, max_count_from_rate(1.25e-7, counts.num_tokens))

Importing this module needs numpy and torch alone; readers and tokenizers load their
libraries when they are used.
"""

from recallzoo.text.corpus import Document, read_documents
from recallzoo.text.data import (
    Boundary,
    ContextBatch,
    Contexts,
    Split,
    TokenData,
    TokenStream,
    open_data,
)
from recallzoo.text.labels import (
    PAPER_RATE,
    Labels,
    label_ar_hits,
    label_pairs,
    max_count_from_rate,
)
from recallzoo.text.pair_counts import PairCounts
from recallzoo.text.preparing import PrepareOptions, prepare
from recallzoo.text.tokenizer import tokenizer_hash

__all__ = [
    "PAPER_RATE",
    "Boundary",
    "ContextBatch",
    "Contexts",
    "Document",
    "Labels",
    "PairCounts",
    "PrepareOptions",
    "Split",
    "TokenData",
    "TokenStream",
    "label_ar_hits",
    "label_pairs",
    "max_count_from_rate",
    "open_data",
    "prepare",
    "read_documents",
    "tokenizer_hash",
]
