# SPDX-License-Identifier: GPL-2.0-only
.PHONY: demo lint test
demo: ; @scripts/demo
lint: ; @scripts/lint
test: ; @scripts/test
