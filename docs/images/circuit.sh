#!/usr/bin/env bash
# Redraw circuit.png: the circuit page of the README's prompt, photographed with a headless Chromium.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
.venv/bin/hooked-mamba circuit "I like to eat toast for breakfast. I'm so" --target " hungry" --minus " sad" \
  --coder tinystories-4l/l1-mambacoder --coder tinystories-4l/l2-mambacoder --coder tinystories-4l/l3-mambacoder \
  --budget 60 --out out/circuit.html
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --force-device-scale-factor=1.25 \
  --window-size=1180,"${1:-690}" --screenshot=docs/images/circuit.png "file://$PWD/out/circuit.html"
