"""Makes vectors of documents and finds those nearest to a query: python samples/find_passages.py [QUERY]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import rwkv_stream as rs

query = sys.argv[1] if len(sys.argv) > 1 else "bees that dance"
documents = [json.loads(line) for line in Path("samples/documents.jsonl").read_text(encoding="utf-8").splitlines()]
model = rs.load()

vectors = rs.embed([document["text"] for document in documents], model=model)  # float32 [n, D], of length 1
nearest = np.argsort(-(vectors @ rs.embed([query], model=model)[0]))[:3]
for i in nearest:
    print(f"{documents[i]['id']}: {documents[i]['title']}")
