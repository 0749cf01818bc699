# SPDX-License-Identifier: GPL-2.0-only
.PHONY: demo lint storm test
demo: ; @scripts/demo
lint: ; @scripts/lint
storm: ; @scripts/storm
test: ; @scripts/test
