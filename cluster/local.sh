#!/usr/bin/env bash
# A Ray cluster of two nodes on this machine: cluster/local.sh start | env | status | stop
# What a real cluster does and a local `ray.init` does not: two raylets, tokens, `ray job submit`.
#
# Both nodes have the address 127.0.0.1, but Ray's server listens on every interface: the token keeps others out.
# NODE_CPUS (2), PORT (6379; Ray's client server has the next one), DASHBOARD_PORT (8265) and STATE (a folder) can be set.
# Only the processes started here are stopped, by id.
set -euo pipefail
cd "$(dirname "$0")/.."
STATE=${STATE:-$PWD/runs/.local_cluster}
NODE_CPUS=${NODE_CPUS:-2} PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
RAY=$PWD/.venv/bin/ray
[ -x "$RAY" ] || RAY=ray

# Ray 2.60 wants a token from everything that joins or submits to a cluster made by `ray start`.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/auth_token

start_node() { # name, arguments of `ray start`
  local name=$1
  shift
  # --block: the process lives as long as its node, and takes the node with it. Free ports for workers and agents:
  # nodes share one address, and an agent that finds its port taken accepts no jobs. A temporary folder of our own:
  # Ray's default one makes any later `ray.init` on this machine join.
  nohup "$RAY" start "$@" --block --node-ip-address=127.0.0.1 --num-cpus="$NODE_CPUS" --disable-usage-stats \
    --temp-dir="$(cat "$STATE/temp_dir")" --min-worker-port=0 --max-worker-port=0 \
    --dashboard-agent-listen-port=0 >"$STATE/$name.log" 2>&1 </dev/null &
  echo $! >"$STATE/$name.pid"
}

alive() { # name: is its process still a `ray start` of ours? (ids are used again)
  [ -f "$STATE/$1.pid" ] && ps -o args= -p "$(cat "$STATE/$1.pid")" 2>/dev/null | grep -q "ray start"
}

nodes() {
  timeout 20 "$RAY" status --address="127.0.0.1:$(cat "$STATE/port")" 2>/dev/null | grep -c '^ 1 node_' || true
}

wait_for_nodes() { # count
  for _ in $(seq 60); do
    sleep 1
    alive head || break
    [ "$(nodes)" != "$1" ] || return 0
  done
  tail -n 40 "$STATE"/*.log >&2
  echo "local.sh: the cluster did not reach $1 nodes; its output, whose ends are above, is in $STATE/head.log and worker.log" >&2
  stop
  exit 1
}

start() {
  if alive head || alive worker; then
    echo "local.sh: already running; stop it with: cluster/local.sh stop" >&2
    exit 1
  fi
  mkdir -p "$STATE"
  (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$STATE/auth_token")
  mktemp -d /tmp/ifguide.XXXXXX >"$STATE/temp_dir" # short: socket paths have at most 107 bytes
  echo "$PORT" >"$STATE/port"
  echo "$DASHBOARD_PORT" >"$STATE/dashboard_port"
  start_node head --head --port="$PORT" --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" \
    --ray-client-server-port="$((PORT + 1))"
  wait_for_nodes 1
  start_node worker --address="127.0.0.1:$PORT"
  wait_for_nodes 2
  echo "Two nodes of $NODE_CPUS CPUs. In the shell that uses them:"
  echo "  eval \"\$(cluster/local.sh env)\""
  echo "  $RAY job submit -- ${RAY%ray}python $PWD/jobs/run.py --config FILE"
}

environment() { # what a shell must export to use the cluster
  if ! alive head; then
    echo "local.sh: not running; start it with: cluster/local.sh start" >&2
    exit 1
  fi
  echo "export RAY_ADDRESS=127.0.0.1:$(cat "$STATE/port")"
  echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$(cat "$STATE/dashboard_port")"
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/auth_token"
}

stop() {
  local name
  for name in worker head; do
    if alive $name; then
      kill "$(cat "$STATE/$name.pid")"
      for _ in $(seq 60); do # Ray drains a node for up to 30 seconds
        alive $name || break
        sleep 1
      done
      if alive $name; then kill -9 "$(cat "$STATE/$name.pid")"; fi
    fi
    rm -f "$STATE/$name.pid"
  done
  if [ -f "$STATE/temp_dir" ]; then rm -rf "$(cat "$STATE/temp_dir")"; fi
  rm -f "$STATE"/{temp_dir,port,dashboard_port,auth_token}
}

case "${1:-}" in
  start) start ;;
  env) environment ;;
  stop) stop ;;
  status)
    if alive head; then echo "$(nodes) nodes"; else echo "not running" && exit 1; fi
    ;;
  *) echo "usage: cluster/local.sh start | env | status | stop" >&2 && exit 2 ;;
esac
