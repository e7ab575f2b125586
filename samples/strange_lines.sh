#!/bin/sh
# Makes a web server's log with anomalies hidden in it, and prints the lines that surprise the model most.
set -eu
log=${1:-build/access.log}
mkdir -p "$(dirname "$log")"
python samples/weblog.py --lines 500 --seed 7 --anomalies 4 > "$log"
rwkv-stream score "$log" --unit line --top 5
