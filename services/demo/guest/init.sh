#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# First process of the demo guest: mounts, drivers, one address; then the workload takes over as
# process 1, so that its end is a kernel panic (seen, with -no-reboot) and never a quiet stop.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1

# The image builder has put the modules in dependency order.
while read -r module; do
	$b insmod "/modules/$module" || echo "INIT cannot load $module"
done </modules/order

set --
for word in $($b cat /proc/cmdline); do
	case $word in
	mib=* | hb_ms=* | rate=* | sweep_ms=* | disk=*) set -- "$@" "$word" ;;
	net=*)
		# net=ADDRESS/PREFIX,PEER: the workload needs the peer alone.
		address=${word#net=}
		peer=${address#*,}
		if $b ip address add "${address%%,*}" dev eth0 && $b ip link set eth0 up; then
			set -- "$@" "net=$peer"
		else
			echo "INIT no network card"
		fi
		;;
	esac
done
exec /bin/workload "$@"
