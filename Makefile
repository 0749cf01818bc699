# SPDX-License-Identifier: GPL-2.0-only
.PHONY: bench demo lint matrix storm test
bench: ; @scripts/bench
demo: ; @scripts/demo
lint: ; @scripts/lint
matrix: ; @scripts/matrix
storm: ; @scripts/storm
test: ; @scripts/test
