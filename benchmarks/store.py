"""What the store costs: writing and restoring snapshots, reading with them, sharing beginnings, and 100,000 of them.

    python benchmarks/store.py [snapshots] [ingest-cost] [shared-beginnings] [edited] [short-texts] [scale]

Each case enters its figures into `benchmarks/results/store.json`. To be run alone on the machine; ratios come from
alternating runs in one process. Models and fake records are those of the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fake_snapshots import CHUNK, MODEL, START, digest, fake, fake_hidden  # noqa: E402
from tiny_models import official_weights, save  # noqa: E402

from rwkv_stream.model import Model, load  # noqa: E402
from rwkv_stream.model.state import State  # noqa: E402
from rwkv_stream.reading import ingest  # noqa: E402
from rwkv_stream.reading.reading import SNAPSHOT_EVERY_TOKENS  # noqa: E402
from rwkv_stream.store import Store, objects, records  # noqa: E402
from rwkv_stream.store.records import Head, NewSnapshot, Snapshot, StoredObject, snapshot_id  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "store.json"
PROGRAM = [sys.executable, "-Im", "rwkv_stream.cli"]
WORDS = (ROOT / "samples" / "story.txt").read_text(encoding="utf8").split()
SHAPES = {"0.1B": (12, 768), "1.5B": (24, 2048), "7.2B": (32, 4096)}


def prose(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    before = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - before, result


def median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 2)


# ---- one snapshot ----


def states_of(n_layer: int, n_embd: int, folder: Path, n: int) -> list[State]:
    """`n` states of a shape: layer by layer what one layer of random weights makes of 128 random bytes."""
    path = save(official_weights(n_layer=1, n_embd=n_embd, d_ffn=n_embd), folder / f"{n_embd}.safetensors")
    model = load(path, device="cpu")
    made = []
    for seed in range(n):
        tokens = torch.randint(0, 256, (n_layer, 128), generator=torch.Generator().manual_seed(seed))
        _, rows = model.forward(tokens, logits="none")
        made.append(State({name: tensor.transpose(0, 1).contiguous() for name, tensor in rows.items()}))
    return made


def shipped_states(n: int) -> list[State]:
    model = load(device="cpu")
    state, made = model.start()[1], []
    ids = torch.tensor([model.tokenizer.encode((ROOT / "samples" / "story.txt").read_text(encoding="utf8"))])
    for i in range(n):
        _, state = model.forward(ids[:, 1024 * i : 1024 * (i + 1)], state, logits="none")
        made.append(state)
    return made


def snapshots(folder: Path) -> dict[str, Any]:
    """Writing and restoring, beside what disk and memory do with the same bytes."""
    figures: dict[str, Any] = {"disk": "the folder for temporary files"}
    cases = {"shipped model": lambda: shipped_states(8)}
    cases |= {
        name: lambda shape=shape: states_of(*shape, folder, 8)  # type: ignore[misc]
        for name, shape in SHAPES.items()
    }
    for name, make in cases.items():
        store = Store(folder / f"{name}.store", create=True)
        encode, put, head, restore, disk, copy = ([] for _ in range(6))
        with store.writing("book.txt", MODEL):
            for i, state in enumerate(make()):
                hidden = fake_hidden(i)
                new = fake(CHUNK * (i + 1), name)
                spent, (data, _) = timed(encode_state, new, state, hidden)
                encode.append(spent)
                spent, made = timed(store.put, new, state, hidden)
                put.append(spent)
                head.append(timed(store.move_head, "book.txt", MODEL, made.id)[0])
                restore.append(timed(restored, store, made.id)[0])
                disk.append(timed(write_and_sync, folder / "raw", data)[0])
                copy.append(timed(state.clone)[0])
        figures[name] = {
            "state_bytes": made.state_bytes,
            "stored_bytes": made.size_bytes,
            "encode_ms": median_ms(encode),
            "put_ms": median_ms(put),
            "move_head_ms": median_ms(head),
            "write_mb_s": round(made.state_bytes / statistics.median(put) / 1e6, 1),
            "restore_ms": median_ms(restore),
            "raw_write_and_fsync_ms": median_ms(disk),
            "memory_copy_ms": median_ms(copy),
        }
        shutil.rmtree(store.path)
        print(name, figures[name], flush=True)
    return figures


def encode_state(new: NewSnapshot, state: State, hidden: torch.Tensor) -> tuple[bytes, int]:
    return objects.encode_state(new, state, hidden, state.digest())


def restored(store: Store, ref: str) -> tuple[State, torch.Tensor]:
    return store.get(ref).load()


def write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# ---- readings ----


def ingest_cost(folder: Path) -> dict[str, Any]:
    """The same reading with a snapshot every 4,096 tokens and with the last one only, in turns."""
    path = save(official_weights(n_layer=12, n_embd=768, d_ffn=3072), folder / "0.1B.safetensors")
    model = load(path, device="cpu")
    n_tokens, rounds = 12_288, 2
    text = folder / "text"
    text.write_text(prose(n_tokens, 1)[:n_tokens])
    seconds: dict[int, list[float]] = {4096: [], n_tokens: []}
    for turn in range(rounds):
        for every in sorted(seconds, reverse=turn % 2 == 0):
            store = Store(folder / "cost.store", create=True)
            report = ingest.ingest(str(text), name="t", model=model, store=store, snapshot_every=every)
            seconds[every].append(report.elapsed_s)
            shutil.rmtree(store.path)
    pairs = [a / b for a, b in zip(seconds[4096], seconds[n_tokens], strict=True)]
    return {
        "shape": "12 layers of width 768, 256 entries (raw bytes), fp32, random weights",
        "tokens": n_tokens,
        "seconds_every_4096": [round(s, 2) for s in seconds[4096]],
        "seconds_last_only": [round(s, 2) for s in seconds[n_tokens]],
        "ratio_of_medians": round(statistics.median(seconds[4096]) / statistics.median(seconds[n_tokens]), 4),
        "ratios_of_pairs": [round(pair, 4) for pair in pairs],
    }


def shared_beginnings(folder: Path) -> dict[str, Any]:
    """Ten documents with a common beginning of 50,000 tokens, by the shipped model."""
    model = load(device="cpu")
    beginning = prose(60_000, 1)
    while len(model.tokenizer.encode(beginning)) > 50_000:
        beginning = beginning[: int(len(beginning) * 0.999)]
    store = Store(folder / "shared.store", create=True)
    computed, total, saved = [], 0, []
    for i in range(10):
        (folder / "text").write_text(f"{beginning}\n\nThe end, number {i}: {prose(1500, 100 + i)}")
        report = ingest.ingest(str(folder / "text"), name=f"document {i}", model=model, store=store)
        computed.append(report.tokens - report.resumed_from_token)
        total += report.tokens
        saved.append(round(report.saved_s or 0, 2))
    return {"tokens": total, "tokens_computed": sum(computed), "of_each": computed, "seconds_saved_of_each": saved}


def edited(folder: Path) -> dict[str, Any]:
    """A text of 500,000 tokens (bytes), read, edited at 70 %, read again."""
    model = one_layer_model(folder)
    text = prose(120_000, 1)[:500_000]
    store = Store(folder / "edited.store", create=True)
    (folder / "text").write_text(text)
    first = ingest.ingest(str(folder / "text"), name="t", model=model, store=store)
    at = int(len(text) * 0.7)
    (folder / "text").write_text(f"{text[:at]}, and so on, {text[at:]}")
    second = ingest.ingest(str(folder / "text"), name="t", model=model, store=store)
    again = second.tokens - second.resumed_from_token
    return {
        "tokens": first.tokens,
        "read_again": again,
        "share": round(again / second.tokens, 4),
        "snapshot_every": SNAPSHOT_EVERY_TOKENS,
        "limit": round(0.3 * second.tokens + SNAPSHOT_EVERY_TOKENS),
    }


def short_texts(folder: Path, n: int = 3000, n_bytes: int = 280) -> dict[str, Any]:
    """Many texts of a few sentences, read by the shipped model, and the same again: processor seconds, and bytes."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(n):
        (texts / f"{i:04}.txt").write_text(prose(n_bytes, i)[:n_bytes])
    figures: dict[str, Any] = {"texts": n, "bytes_each": n_bytes}
    command = [*PROGRAM, "ingest", "--quiet", "--store", str(folder / "a.store"), str(texts)]
    for name in ("first", "again"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent, _ = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures[f"{name}_s"] = round(spent, 1)
        figures[f"{name}_cpu_s"] = round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1)
    found = [path.stat() for path in (folder / "a.store").rglob("*") if path.is_file()]
    figures["files"] = len(found)
    figures["mb"] = round(sum(status.st_size for status in found) / 1e6, 1)
    figures["mb_in_blocks"] = round(sum(status.st_blocks * 512 for status in found) / 1e6, 1)
    return figures


def one_layer_model(folder: Path) -> Model:
    return load(save(official_weights(n_layer=1), folder / "one.safetensors"), device="cpu")


# ---- many ----


def scale(folder: Path, n_documents: int = 1000, n_each: int = 100) -> dict[str, Any]:
    """Lists, trees and references in a store of many snapshots, whose records are written here without a sync."""
    path = folder / "scale.store"
    store = fill(path, n_documents, n_each)
    newest = store.get(f"books/{n_documents // 2:04d}.txt")
    store.tag("here", newest.id)
    document = newest.document
    figures: dict[str, Any] = {"snapshots": n_documents * n_each, "documents": n_documents}

    def note(name: str, work: Callable[[], Any]) -> None:
        figures[f"{name}_ms"] = median_ms([timed(work)[0] for _ in range(5)])
        print(name, figures[f"{name}_ms"], flush=True)

    note("open", lambda: Store(path))
    note("list_first_of_all", lambda: next(store.list()))
    note("list_all", lambda: sum(1 for _ in store.list()))
    note("list_document", lambda: list(store.list(document)))
    for ref in (document, f"{document}@160", f"{document}@50%", f"{document}@byte:1000", f"{document}~50", "here"):
        note(f"get {ref.replace(document, 'NAME')}", lambda ref=ref: store.get(ref))  # type: ignore[misc]
    note("get trailing part of a name", lambda: store.get(document.removeprefix("books/")))
    note("get id prefix", lambda: store.get(newest.id[:10]))
    note("search_of_a_new_document", lambda: (store.reach(MODEL, START, None, 1 << 18), unknown(store)))
    figures["clearing_up_ms"] = median_ms([timed(store._sessions.keeper.update)[0]])
    figures["rebuild_ms"] = median_ms([timed(store.rebuild)[0]])
    for command in ("list DOC", "tree DOC", "list"):
        words = [word.replace("DOC", document) for word in command.split()]
        runs = [run("snapshots", *words, "--store", str(path)) for _ in range(5)]
        figures[f"process: snapshots {command}"] = {"seconds": round(statistics.median(runs), 3)}
        print(command, figures[f"process: snapshots {command}"], flush=True)
    figures["process: --help"] = {"seconds": round(statistics.median(run("--help") for _ in range(5)), 3)}
    return figures


def unknown(store: Store) -> object:
    return store.match(MODEL, START, CHUNK, digest("unknown"), numerics={})


def fill(path: Path, n_documents: int, n_each: int) -> Store:
    store = Store(path, create=True)
    where = store._files
    names = [field.name for field in dataclasses.fields(NewSnapshot)]
    for i in range(n_documents):
        document, parent = f"books/{i:04d}.txt", None
        for j in range(1, n_each + 1):
            new = fake(CHUNK * j, document, document=document, parent=parent)
            state_digest = digest(document, j)
            identity = snapshot_id(new.model, new.start_digest, new.chain, new.tokens, state_digest)
            snapshot = Snapshot(
                **{name: getattr(new, name) for name in names},
                id=identity,
                state_digest=state_digest,
                state_bytes=1000,
                objects=(StoredObject(digest("object", document, j), "exact", 1140),),
                created="2026-01-01T00:00:00Z",
                reader=where,
            )
            record = where.record_path(identity)
            record.parent.mkdir(exist_ok=True)
            record.write_bytes(records.encode_record(snapshot))
            parent = identity
        assert parent is not None
        head = Head(document, MODEL, parent, "utf-8", "2026-01-01T00:00:00Z")
        where.head_path(document, MODEL).write_bytes(records.encode_head(head))
    store.rebuild()
    return store


def run(*arguments: str) -> float:
    """Seconds of the whole program."""
    before = time.perf_counter()
    subprocess.run([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - before


# ---- all ----

CASES = {
    "snapshots": snapshots,
    "ingest-cost": ingest_cost,
    "shared-beginnings": shared_beginnings,
    "edited": edited,
    "short-texts": short_texts,
    "scale": scale,
}


def machine() -> dict[str, Any]:
    flags = Path("/proc/cpuinfo").read_text().split("flags")[1].split("\n")[0].split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    chosen = parser.parse_args().cases or list(CASES)
    if unknown_cases := set(chosen) - CASES.keys():
        parser.error(f"expected {', '.join(CASES)}, found {', '.join(sorted(unknown_cases))}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in chosen:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = CASES[name](Path(folder)) | {"machine": machine()}
        print(json.dumps(results[name], indent=1))
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
