# SPDX-License-Identifier: GPL-2.0-only
# What the scripts share; sourced, with $tree set.

KVIRT_CACHE=${KVIRT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvirt}
export KVIRT_CACHE
# Sets $venv, once there is a Python. It is outside the tree, which guests mount. A tree has one; a changed
# pyproject.toml or Python makes a new one.
find_venv() {
	tree_key=$(echo "$tree" | sha256sum | cut -c1-8)
	venv=$KVIRT_CACHE/venv/$tree_key-$({ /usr/bin/python3 --version; cat "$tree/pyproject.toml"; } | sha256sum | cut -c1-8)
}

# Runs a command as root, with the caller's cache, pip configuration and proxies.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo --preserve-env=http_proxy,https_proxy,no_proxy \
			env HOME="$HOME" KVIRT_CACHE="$KVIRT_CACHE" PATH="$PATH" "$@"
	fi
}
