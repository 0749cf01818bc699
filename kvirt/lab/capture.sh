#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Saves the memory of a kernel that has crashed. init.sh runs it in the capture kernel, in place of the agent.
# $1: what to save, as kvirt/lab/capture.py names it: the makedumpfile option of a compression with a dump
# level, or elf.

mkdir /run/output
mount -t virtiofs kvirt-output /run/output && cd /run/output || exit
# makedumpfile's temporary files have bits for all pages.
export TMPDIR=/run/output
for save in $(echo "$1" | tr , ' '); do
	echo "kvirt: saving $save"
	level=${save#?}
	case $save in
	elf) cp --sparse=always /proc/vmcore partial >$save.log 2>&1 ;;
	*) makedumpfile --message-level 6 "-${save%"$level"}" -d "$level" /proc/vmcore partial >"$save.log" 2>&1 ;;
	esac || { cat "$save.log"; exit 1; }
	mv partial "$save"
done
echo "kvirt: saved all"
