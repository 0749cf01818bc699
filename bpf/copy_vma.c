/* SPDX-License-Identifier: GPL-2.0-only */
/* mm/vma.c, copy_vma(): mremap() makes the VMA at the new place, in place or displaced. */

struct copy {
	u64 start; /* of the VMA that is copied */
	u64 address;
	u64 length;
	u64 expected; /* page offset at the new address */
	u32 kind;
	bool cow;
};
BPF_HASH(copies, u64, struct copy);

int enter_copy_vma(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct copy copy = {};
	struct vma vma;

	if (!all)
		return 0;
	read_vma(&vma, read_u64(ARGUMENT(ctx, COPY_VMA, VMAP)));
	copy.start = VM_START(&vma);
	copy.address = ARGUMENT(ctx, COPY_VMA, ADDR);
	copy.length = ARGUMENT(ctx, COPY_VMA, LEN);
	copy.cow = is_cow(&vma);
#if KV_LEGACY
	copy.expected = ARGUMENT(ctx, COPY_VMA, PGOFF);
	if (!ANON_VMA(&vma) && is_anonymous(&vma))
#else
	copy.expected = ARGUMENT(ctx, COPY_VMA, ANON_PGOFF);
	if (!ANON_VMA(&vma))
#endif
		copy.expected = PAGE_OF(copy.address);

	if (KV_LEGACY && !is_anonymous(&vma))
		copy.kind = KV_COPY_LEGACY_FILE;
	else if (!ANON_VMA(&vma))
		copy.kind = KV_COPY_UNFAULTED_REINDEXED;
	else if (copy.expected == PAGE_OF(copy.address))
		copy.kind = KV_COPY_FAULTED_HOMECOMING;
	else if (has_family(ANON_VMA(&vma)))
		copy.kind = KV_COPY_FAULTED_DISPLACED_SHARED;
	else
		copy.kind = KV_COPY_FAULTED_DISPLACED_EXCLUSIVE;

	if (copies.lookup(&id))
		count(all, KV_LOST_COPY_VMA);
	if (copies.update(&id, &copy))
		count(all, KV_LOST_COPY_VMA);
	return 0;
}

#ifdef KV_STACKS
static __always_inline void tell_displacer(struct registers *ctx, struct counts *all, struct owner *owner, struct vma *vma)
{
	struct displacer key = {.tgid = owner->tgid};
	struct displacement displacement = {};
	struct displaced none = {}, *displaced;

	key.user = stacks.get_stackid(ctx, BPF_F_USER_STACK);
	key.kernel = stacks.get_stackid(ctx, 0);
	/* -EFAULT: a thread of the kernel has no user stack. Else no room. */
	if ((key.user < 0 && key.user != -14) || key.kernel < 0)
		count(all, KV_LOST_STACKS);
	bpf_get_current_comm(key.comm, sizeof(key.comm));
	displaced = displacers.lookup_or_try_init(&key, &none);
	if (!displaced) {
		count(all, KV_LOST_STACKS);
		return;
	}
	lock_xadd(&displaced->vmas, 1);
	if (!ANON_VMA(vma))
		return;
	name_displacement(&displacement, vma);
	if (displacements.update(&displacement, &key))
		count(all, KV_LOST_STACKS);
}
#endif

int leave_copy_vma(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid(), result = RETURNED(ctx);
	struct copy *copy = copies.lookup(&id);
	struct owner owner;
	struct vma vma;
	bool hit;

	if (!all)
		return 0;
	if (!copy)
		return 0;
	if (!result) {
		/* There is no VMA whose process could be asked for; the caller's is the same. */
		owner.task = bpf_get_current_task();
		owner.task = read_u64(owner.task + KV_TASK_LEADER);
		owner.tgid = id >> 32;
		if (is_wanted(&owner))
			count(all, KV_COPY_FAILED);
		goto out;
	}
	read_vma(&vma, result);
	read_owner(&owner, VM_MM(&vma));
	if (!is_wanted(&owner))
		goto out;

	hit = in_place(&vma);
	if (!copy->cow) {
		count(all, KV_COPY_NONCOW);
	} else {
		count(all, hit ? KV_COPY_HIT : KV_COPY_FALLBACK);
		count(all, copy->kind);
		count_process(all, &owner, hit ? KV_PROCESS_COPY_HIT : KV_PROCESS_COPY_FALLBACK, hit);
#ifdef KV_STACKS
		if (!hit)
			tell_displacer(ctx, all, &owner, &vma);
#endif
	}
	if (VM_START(&vma) <= copy->start && copy->start < VM_END(&vma))
		count(all, KV_COPY_SELF_MERGED);
	else if (VM_START(&vma) != copy->address || VM_END(&vma) != copy->address + copy->length)
		count(all, KV_COPY_MERGED);
	else
		count(all, KV_COPY_NEW);
	/* Others merge by the file's offset alone, and take over the neighbour's: needs_adjacent_anon_pgoff(). */
	if (KV_LEGACY || copy->cow)
		assert_equal(ctx, all, KV_COPY_AP, &owner, &vma, copy->address, copy->expected,
		     anon_pgoff(&vma) + PAGE_OF(copy->address - VM_START(&vma)));
out:
	copies.delete(&id);
	return 0;
}
