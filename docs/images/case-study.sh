#!/usr/bin/env bash
# Redraw case-study.png: run the case study (what is there already is kept), then photograph its report's top.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
.venv/bin/python -m demos.hunger --document docs/case-study.md
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --virtual-time-budget=8000 \
  --window-size=1180,"${1:-1150}" --screenshot=docs/images/case-study.png "file://$PWD/out/hunger/report.html"
