/* SPDX-License-Identifier: GPL-2.0-only */
/* kernel/fork.c and kernel/exit.c: the descendants of a command belong to it, until they are gone. */

int follow_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct counts *all = counters();
	u32 parent = read_u32(ctx->args[0] + KV_TASK_TGID);
	u32 child = read_u32(ctx->args[1] + KV_TASK_TGID);
	u8 yes = 1;

	if (!all)
		return 0;
	/* A new thread belongs already. */
	if (parent != child && family.lookup(&parent) && family.update(&child, &yes))
		count(all, KV_LOST_FAMILY);
	return 0;
}

int forget_process(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = read_u32(ctx->args[0] + KV_TASK_TGID);

	if (tgid == read_u32(ctx->args[0] + KV_TASK_PID))
		family.delete(&tgid);
	return 0;
}
