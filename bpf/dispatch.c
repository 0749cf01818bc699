/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One probe of many functions, which the kernel makes and takes away in one go. The cookie says which program is
 * meant. Where each function has a probe of its own, this is not loaded: see kvirt/trace/hooks.py.
 */
BPF_PROG_ARRAY(programs, 16);

int dispatch(struct registers *ctx)
{
	struct counts *all = counters();

	programs.call(ctx, bpf_get_attach_cookie(ctx));
	/* A program that is called does not come back. */
	if (all)
		count(all, KV_LOST_DISPATCH);
	return 0;
}
