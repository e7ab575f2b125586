"""Reads a text once, then asks the states at several places of it: python samples/fork_a_book.py [TEXT] [STORE]"""

from __future__ import annotations

import sys

import rwkv_stream as rs

text = sys.argv[1] if len(sys.argv) > 1 else "samples/story.txt"
store = rs.Store(sys.argv[2] if len(sys.argv) > 2 else "build/samples.store", create=True)
model = rs.load()

report = rs.ingest(text, model=model, store=store, snapshot_every=4096)
print(f"{report.document}: {report.tokens:,} tokens, {report.snapshots_written} new snapshots")
for share in (50, 100):
    snapshot = store.get(f"{text}@{share}%")
    answer = rs.ask("Where does the lamp hang?", snapshot=snapshot, model=model)
    print(f"after {snapshot.tokens:,} tokens: {answer.answer}")
