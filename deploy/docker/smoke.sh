#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Start what an image's tree has, inside of it: each command's help, then the service itself, asked whether it is well.
# As the chart runs it: the orchestrator as nobody in particular, on a root that is read-only.
#
# Usage: deploy/docker/smoke.sh IMAGE ROOT      root only: chroot, and mounts in a namespace of its own
set -euo pipefail
image=$1
root=$(cd "$2" && pwd)

if [ "${GODWIT_SMOKE_INSIDE:-}" != 1 ]; then
	export GODWIT_SMOKE_INSIDE=1
	exec unshare --mount --pid --net --fork --kill-child -- "$0" "$@"
fi

ip link set lo up
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero urandom; do
	touch "$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"

inside=(env -i PATH=/opt/godwit/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp)
as_nobody=("${inside[@]}" chroot --userspec=65532:65532 "$root")
as_root=("${inside[@]}" chroot --userspec=0:0 "$root")

status_of() { # PORT PATH
	"${as_nobody[@]}" python -c "
import urllib.request
print(urllib.request.urlopen('http://127.0.0.1:$1$2', timeout=5).status)"
}

until_it_answers() { # PORT PATH
	for _ in $(seq 100); do
		if [ "$(status_of "$1" "$2" 2>/dev/null)" = 200 ]; then
			echo "$image: answers at $2"
			return
		fi
		kill -0 "$service" 2>/dev/null || break
		sleep 0.2
	done
	echo "$image: does not answer" >&2
	exit 1
}

"${as_nobody[@]}" godwit --help >/dev/null
case $image in
orchestrator)
	"${as_nobody[@]}" godwit orchestrator --help >/dev/null
	"${as_nobody[@]}" godwit certs init /tmp/authority >/dev/null
	"${as_nobody[@]}" godwit orchestrator --store /tmp/godwit.db &
	service=$!
	until_it_answers 8080 /healthz
	"${as_nobody[@]}" godwit idle
	;;
page-server)
	"${as_nobody[@]}" godwit page-server --help >/dev/null
	mkdir -m 755 "$root/tmp/images"
	"${as_root[@]}" godwit page-server --listen 127.0.0.1:7443 --control 127.0.0.1:7444 --metrics 127.0.0.1:9444 \
		--images-dir /tmp/images --ram-dir /dev/shm &
	service=$!
	until_it_answers 9444 /metrics
	"${as_root[@]}" godwit node-wait --images-dir /tmp/images
	;;
fault-agent)
	"${as_nobody[@]}" godwit fault-agent --help >/dev/null
	"${as_nobody[@]}" godwit node-keeper --help >/dev/null
	"${as_nobody[@]}" godwit device-plugin --help >/dev/null
	"${as_nobody[@]}" godwit-microvm --help >/dev/null 2>&1 || [ $? -lt 126 ]
	"${as_root[@]}" tini -- godwit fault-agent --respawn --node smoke --listen 127.0.0.1:7440 --metrics 127.0.0.1:9440 \
		--state-dir /tmp/state --ram-dir /dev/shm/ram --page-server-control 127.0.0.1:7444 &
	service=$!
	until_it_answers 9440 /metrics
	"${as_root[@]}" godwit node-wait --state-dir /tmp/state
	;;
*)
	echo "smoke.sh: no image is called $image" >&2
	exit 2
	;;
esac
# Drained is 0, on SIGTERM, as the kubelet sends it. The chroot's child is the service itself.
kill -TERM "$service"
wait "$service"
echo "$image: drained"
