"""Surprising lines of a log as alerts: how many of them are anomalies, beside how rare a line's template is.

    python benchmarks/alerts.py [--out benchmarks/results/alerts.json] [--lines N] [--anomalies N] [--model PATH]

`samples/weblog.py` makes the log and says which lines are anomalies. The lines of its first fifth are read and not
counted: who watches a log has seen some of it. Each of two scores orders the others: the model's bits a byte, as
`score --follow` has them, and the baseline's -log2 of the share of lines before it that follow its template
(`answers/log_templates.py`; one that none followed counts as half a line). At the same number of alerts, one for each
line that is an anomaly, precision and recall are equal, and are told; and the share of anomalies, of one or more lines,
of which an alert tells a line. Without `--model` the packaged one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))

import weblog

import rwkv_stream as rs
from rwkv_stream.answers.log_templates import template_of

SEEN = 5  # one part in so many is read first


def found(scores: list[float], truth: list[weblog.Truth | None]) -> dict[str, float]:
    """What as many alerts tell as there are lines of anomalies."""
    wanted = sum(one is not None for one in truth)
    alerts = sorted(range(len(scores)), key=lambda i: -scores[i])[:wanted]
    told = [one for i in alerts if (one := truth[i]) is not None]
    anomalies = {one.anomaly for one in truth if one is not None}
    return {
        "alerts": wanted,
        "precision": len(told) / wanted,
        "anomalies_told": len({one.anomaly for one in told}) / len(anomalies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--anomalies", type=int, default=48)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    entries = list(weblog.log(arguments.lines, arguments.seed, arguments.anomalies))
    lines, truth = [str(entry) for entry, _ in entries], [one for _, one in entries]
    first = len(lines) // SEEN
    model = rs.load(arguments.model) if arguments.model is not None else rs.load()
    bits = [0.0] * len(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "access.log"
        path.write_text("\n".join(lines) + "\n")
        for line in rs.score(path, model=model, unit="line", encoding="utf-8"):
            assert line.line is not None
            bits[line.line - 1] = line.bits_per_byte
    seen = Counter[str]()
    rare = []
    for i, line in enumerate(lines):
        template = template_of(line)
        rare.append(math.log2(max(i, 1) / (seen[template] or 0.5)))
        seen[template] += 1
    result = {
        "lines": len(lines) - first,
        "model": found(bits[first:], truth[first:]),
        "template frequency": found(rare[first:], truth[first:]),
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
