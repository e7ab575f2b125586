#!/bin/sh
# Measures a model: whether it finds needles in a text, and how it answers questions on one. RWKV_STREAM_MODEL names it.
set -eu
report=${1:-build/report}
rwkv-stream eval --task niah_single,qa --lengths 512,1024 --depths 0,100 --trials 2 \
    --data samples/questions.jsonl --texts samples/story.txt --strategies state -o "$report"
