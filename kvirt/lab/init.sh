#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Makes a machine out of a read-only root, then runs the agent. Started by the guest's init.

mount -t proc proc /proc
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
# One process for them all: starting one takes a tenth of a second without KVM.
mount --all --fstab /kvirt/kvirt/lab/guest.fstab
chmod 1777 /tmp /var/tmp /dev/shm
echo "kvirt: init" >/dev/console

# Returns the value of kvirt.NAME on the kernel's command line.
option() {
	for word in $(cat /proc/cmdline); do
		case $word in "kvirt.$1="*) echo "${word#*=}" ;; esac
	done
}

capture=$(option capture)
if [ "$capture" ]; then
	sh /kvirt/kvirt/lab/capture.sh "$capture" </dev/null >/dev/console 2>&1
	sync
	echo o >/proc/sysrq-trigger
	sleep 10
fi

release=$(uname -r)
if [ "$(option modules)" ]; then
	mkdir "/usr/lib/modules/$release"
	mount -t virtiofs -o ro kvirt-modules "/usr/lib/modules/$release"
fi
vmlinux=$(option vmlinux)
if [ "$vmlinux" ]; then
	mkdir /run/symbols /usr/lib/debug/boot
	mount -t virtiofs -o ro kvirt-symbols /run/symbols
	ln -s "/run/symbols/$vmlinux" "/usr/lib/debug/boot/vmlinux-$release"
fi
# drgn reads all over a vmlinux of 400 MB: fewer, larger requests halve what that costs without KVM.
for device in /sys/class/bdi/0:*; do
	echo 4096 >"$device/read_ahead_kb"
done
# The host talks to the agent through it.
[ -d /sys/class/virtio-ports ] || modprobe -q virtio_console
# Hands VMCOREINFO to QEMU, for dumps and for debuggers on the host.
[ -d /sys/firmware/qemu_fw_cfg ] || modprobe -q qemu_fw_cfg
ip link set lo up 2>/dev/null
hostname kvirt-guest

export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin LANG=C.UTF-8 TERM=linux
# The tree is read-only and used by the host's Python too. What is in the root has been compiled already.
mkdir /tmp/pycache
ln -s /usr/local/lib/pycache/usr /tmp/pycache/usr
export PYTHONPATH=/kvirt PYTHONPYCACHEPREFIX=/tmp/pycache
cd /root
# Orphans are this shell's, which reaps them while it waits for the agent.
python3 /kvirt/kvirt/lab/agent.py </dev/null >/dev/console 2>&1
echo "kvirt: the agent has ended" >/dev/console
echo o >/proc/sysrq-trigger
sleep 10
