#!/usr/bin/env bash
# A two-node Ray cluster on this machine, for trying out `ray job submit`: cluster/local.sh start | stop
# Nodes listen on loopback and ask for a token, which lies in a file that only you can read.
set -euo pipefail
cd "$(dirname "$0")/.."
state="${IFGUIDE_LOCAL_STATE:-$PWD/runs/local-cluster}"
ray="${RAY:-.venv/bin/ray}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token"

start() {
    mkdir -p "$state"
    if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
    fi
    "$ray" start --head --block --node-ip-address=127.0.0.1 --port=6399 --dashboard-host=127.0.0.1 \
        --dashboard-port=8299 --num-cpus=1 --disable-usage-stats > "$state/head.log" 2>&1 &
    echo $! > "$state/head.pid"
    for _ in $(seq 60); do
        "$ray" status --address=127.0.0.1:6399 > /dev/null 2>&1 && break
        sleep 1
    done
    "$ray" start --block --address=127.0.0.1:6399 --node-ip-address=127.0.0.1 --num-cpus=1 > "$state/worker.log" 2>&1 &
    echo $! > "$state/worker.pid"
    echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
    echo "$ray job submit --address=http://127.0.0.1:8299 --working-dir . -- python jobs/run.py --config FILE"
}

stop() {
    for node in worker head; do
        if [ -s "$state/$node.pid" ]; then
            kill "$(cat "$state/$node.pid")" 2> /dev/null || true
            rm -f "$state/$node.pid"
        fi
    done
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    *) echo "usage: cluster/local.sh start | stop" >&2; exit 2 ;;
esac
