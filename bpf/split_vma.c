/* SPDX-License-Identifier: GPL-2.0-only */
/* mm/vma.c, __split_vma(): split_vma() only counts mappings around it, and munmap() goes past that. */

struct split {
	struct owner owner;
	u32 kind;
};
BPF_HASH(splits, u64, struct split);
/* How often it failed, by -errno. */
BPF_HASH(split_errors, int, u64, 256);

int enter_split_vma(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct split split = {};
	struct vma vma;

	if (!all)
		return 0;
	read_vma(&vma, ARGUMENT(ctx, SPLIT_VMA, VMA));
	read_owner(&split.owner, VM_MM(&vma));
	if (splits.lookup(&id)) {
		count(all, KV_LOST_SPLIT_VMA);
		splits.delete(&id);
	}
	if (!is_wanted(&split.owner))
		return 0;
	if (!is_cow(&vma))
		split.kind = KV_SPLIT_NONCOW;
	else
		split.kind = in_place(&vma) ? KV_SPLIT_HIT : KV_SPLIT_FALLBACK;
	if (splits.update(&id, &split))
		count(all, KV_LOST_SPLIT_VMA);
	return 0;
}

int leave_split_vma(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct split *split = splits.lookup(&id);
	int error = RETURNED(ctx);
	u64 none = 0, *n;
	bool hit;

	if (!all)
		return 0;
	if (!split)
		return 0;
	if (error) {
		count(all, KV_SPLIT_FAILED);
		n = split_errors.lookup_or_try_init(&error, &none);
		if (n)
			lock_xadd(n, 1);
	} else {
		count(all, split->kind);
		hit = split->kind == KV_SPLIT_HIT;
		if (hit || split->kind == KV_SPLIT_FALLBACK)
			count_process(all, &split->owner, hit ? KV_PROCESS_SPLIT_HIT : KV_PROCESS_SPLIT_FALLBACK, hit);
	}
	splits.delete(&id);
	return 0;
}
