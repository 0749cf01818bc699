# SPDX-License-Identifier: GPL-2.0-only
.PHONY: bench demo lint storm test
bench: ; @scripts/bench
demo: ; @scripts/demo
lint: ; @scripts/lint
storm: ; @scripts/storm
test: ; @scripts/test
