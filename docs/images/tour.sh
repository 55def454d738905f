#!/usr/bin/env bash
# Redraw tour.png, the README's picture: make the page, then photograph its top with a headless Chromium.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
.venv/bin/python -m demos.tour --out out/tour.html
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --virtual-time-budget=8000 \
  --window-size=1180,"${1:-1075}" --screenshot=docs/images/tour.png "file://$PWD/out/tour.html"
