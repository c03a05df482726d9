"""Train two small models that differ in reach alone, and audit one against the other.

    recallzoo prepare ... --out DIR
    python benchmarks/audit_demo.py --data DIR --work WORK

Both are Hugging Face models of the Qwen2 architecture with equal sizes, initial weights, batches
and schedule. Their first layer sees 4 tokens; the second sees 4 as well (`window`) or the whole
context (`attention`). What `window` loses is what it cannot reach. On a GPU if there is one, else
some minutes on a CPU for each; a model that is finished in WORK is not trained again. Writes
results/audit_demo.json, and the report's charts beside it.
"""

import argparse
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from recallzoo.cli import main as recallzoo
from recallzoo.evaluate.audit_store import Audit
from recallzoo.files import atomic_folder, read_json, write_json
from recallzoo.text import TokenData, open_data

WINDOW = 4
MODELS = {"attention": "full_attention", "window": "sliding_attention"}
"""Name -> type of the second layer."""


def build(data: TokenData, second_layer: str, seq_len: int) -> Qwen2ForCausalLM:
    """Two layers, width 128; equal weights whatever the second layer sees."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=data.vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=seq_len,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", second_layer],
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=data.boundary.id,
        )
    )


def train(model: Any, data: TokenData, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Next-token training: AdamW, warm-up and cosine, clipped at 1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    windows = data.split("train").contexts(
        options.seq_len + 1, stride=options.seq_len, partial="drop"
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    warm_up = max(options.steps // 20, 1)
    start, recent = time.monotonic(), []
    with tqdm(range(options.steps), desc=name, unit="step") as bar:
        for step in bar:
            decay = 0.55 + 0.45 * math.cos(math.pi * step / options.steps)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min((step + 1) / warm_up, decay)
            at = int(step * options.batch_size % max(len(order) - options.batch_size, 1))
            rows = order[at : at + options.batch_size]
            tokens = windows.batch(rows.numpy()).tokens.to(device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{sum(recent[-50:]) / len(recent[-50:]):.3f}")
    return {
        "final_train_loss_nats": round(sum(recent[-50:]) / len(recent[-50:]), 4),
        "seconds": round(time.monotonic() - start, 1),
        "tokens": options.steps * options.batch_size * options.seq_len,
    }


def write_results(audit: Audit, trained: dict[str, Any], command: str, out: Path) -> None:
    """The small part of an audit that is worth keeping."""
    about = audit.about
    kept = ("all", "ar_hit", "other", "repeated", "new", "distance", "frequency", "domain")
    rows = [
        {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in row.items()
            if name not in ("slice_low", "slice_high", "slice_order")
        }
        for row in audit.summary().iter_rows(named=True)
        if row["slice_kind"] in kept
    ]
    names = ("data", "context", "stride", "bos", "documents", "cuts", "pair_counts", "models",
             "bootstrap", "notes", "provenance")  # fmt: skip
    content = {name: about[name] for name in names}
    for model in content["models"]:
        model["path"] = model["name"]
    write_json(
        out / "audit_demo.json",
        {"command": command, "training": trained, **content, "summary": rows},
    )
    for chart in sorted((audit.folder / "report").rglob("*.svg")):
        shutil.copyfile(chart, out / chart.name.replace("audit_", "audit_demo_", 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of recallzoo prepare")
    parser.add_argument("--work", type=Path, required=True, help="for models and the audit")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-tokens", type=int, default=300_000, help="of test text to audit")
    options = parser.parse_args()
    data = open_data(options.data, verify=True)
    trained = {}
    for name, second_layer in MODELS.items():
        folder = options.work / name
        if not folder.exists():
            model = build(data, second_layer, options.seq_len)
            trained[name] = train(model, data, name, options)
            with atomic_folder(folder) as unfinished:
                model.save_pretrained(unfinished)
                AutoTokenizer.from_pretrained(data.tokenizer_folder).save_pretrained(unfinished)
                write_json(unfinished / "training.json", trained[name])
        else:
            trained[name] = read_json(folder / "training.json")
    audited = options.work / "audit"
    arguments = ["audit", options.work / "window", "--data", options.data,
                 "--reference", options.work / "attention", "--context", options.seq_len,
                 "--max-tokens", options.max_tokens, "--out", audited,
                 "--formats", "html", "svg"]  # fmt: skip
    code = recallzoo([str(argument) for argument in arguments])
    if code:
        return code
    command = (
        f"python benchmarks/audit_demo.py --data {data.name} --work WORK --steps {options.steps} "
        f"--batch-size {options.batch_size} --seq-len {options.seq_len} --learning-rate "
        f"{options.learning_rate:g} --max-tokens {options.max_tokens}"
    )
    write_results(Audit.open(audited), trained, command, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
