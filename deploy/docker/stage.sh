#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Lay out what Godwit adds to an image: /opt/godwit and its documents, below a directory. The Dockerfile's
# build stage runs it, and so does `make image-rootfs`, so that both have the same tree.
#
# Usage: deploy/docker/stage.sh IMAGE DIRECTORY      IMAGE: orchestrator, page-server or fault-agent
# Needs `make setup` done. Reproducible: pins with hashes, no time but SOURCE_DATE_EPOCH (default: of the
# commit), bytecode that holds none, nothing of this machine.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '/^# Usage/s/^# //p' "$0" >&2; exit 2; }
image=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
umask 022

prefix=$out/opt/godwit
[ ! -e "$prefix" ] || { echo "$prefix is there already" >&2; exit 2; }
version=$(.venv/bin/python -c 'import sys; print(f"python3.{sys.version_info.minor}")')
site=$prefix/lib/$version/site-packages
mkdir -p "$prefix/bin" "$site"

# A virtual environment as `python -m venv` lays it out, of the image's own interpreter.
ln -s "/usr/bin/$version" "$prefix/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$prefix/pyvenv.cfg"

lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
.venv/bin/python -m tools.runtime_lock "$image" >"$lock"
.venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps --no-compile \
	--require-hashes --requirement "$lock" --target "$site"
# Scripts that say where they were made; nobody starts them.
rm -rf "$site/bin"
# pip's note of where a package came from, and when.
find "$site" -name RECORD -path '*.dist-info/*' -o -name INSTALLER -o -name REQUESTED -o -name direct_url.json |
	xargs -r rm -f

git ls-files services clients/python/godwit 2>/dev/null | grep -v -e '/guest/' -e '^services/demo/.*\.sh$' |
	while read -r file; do
		target=$site/${file#clients/python/}
		mkdir -p "$(dirname "$target")"
		cp "$file" "$target"
	done
if [ "$image" != orchestrator ]; then
	cp services/pagecore/_native.abi3.so "$site/services/pagecore/"
	strip --strip-unneeded "$site/services/pagecore/_native.abi3.so"
fi
if [ "$image" = fault-agent ]; then
	cp build/native/godwit-microvm "$prefix/bin/"
	strip --strip-unneeded "$prefix/bin/godwit-microvm"
fi
cat >"$prefix/bin/godwit" <<'END'
#!/opt/godwit/bin/python
import sys

from services.cli.main import main

sys.exit(main())
END
chmod 755 "$prefix/bin/godwit"

documents=$out/usr/share/doc/godwit
mkdir -p "$documents"
cp -r docs/runbooks docs/recovery.md docs/fleet.md docs/hardening.md LICENSE NOTICE "$documents"

# Without a time in it: a read-only root cannot have it made later.
.venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$out" "$site"
find "$out" -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
