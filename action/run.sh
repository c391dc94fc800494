#!/usr/bin/env bash
# Restores an export, runs a command in front of the proxy, and saves the export unless nothing may be bought.
# Usage: run.sh PROGRAM. In the environment: COMMAND, CONFIG, EXPORT, FROZEN as in action.yml.
set -euo pipefail

program=$1
options=()
[ -z "${CONFIG:-}" ] || options=(--config "$CONFIG")

if [ -f "$EXPORT" ]; then
    "$program" cache import "$EXPORT" "${options[@]}"
elif [ "$FROZEN" = true ]; then
    echo "There is no $EXPORT; record it with \`frozen: false\`, and commit it." >&2
    exit 2
fi

if [ "$FROZEN" = true ]; then
    exec "$program" run --frozen "${options[@]}" -- bash -c "$COMMAND"
fi
code=0
"$program" run "${options[@]}" -- bash -c "$COMMAND" || code=$?
# Also when the command has failed: what was bought is kept.
"$program" cache export "$EXPORT" --force "${options[@]}"
exit "$code"
