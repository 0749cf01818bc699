/* SPDX-License-Identifier: GPL-2.0-only */
/* The functions that a walk calls for each VMA, all of them rmap_one(folio, vma, address, arg). */

static __always_inline u32 fallback_reason(struct vma *vma, u64 address)
{
	u64 flags = VM_FLAGS(vma);

	if (flags & KV_VM_GROWSDOWN)
		return (flags & KV_VM_STACK_SETUP) == KV_VM_STACK_SETUP ? KV_RMAP_TEMP_STACK
									: KV_RMAP_STACK_DISPLACED;
#if KV_LEGACY
	if (VM_FILE(vma))
		return KV_RMAP_FILE_PRIVATE_LEGACY;
#endif
	if (VM_FILE(vma) && is_anonymous(vma))
		return KV_RMAP_DEVZERO;
	if (!is_chain_singular(vma, address) || has_family(ANON_VMA(vma)))
		return KV_RMAP_FAULTED_DISPLACED_SHARED;
	return KV_RMAP_FAULTED_DISPLACED_EXCLUSIVE;
}

int rmap_one(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	u64 folio = ARGUMENT_(ctx, 0), address = ARGUMENT_(ctx, 1), at = ARGUMENT_(ctx, 2);
	u64 mapping = folio ? read_u64(folio + KV_FOLIO_MAPPING) : 0;
	struct walk *walk = walks.lookup(&id);
	u64 index, base, expected, function;
	u32 flags = mapping & MAPPING_FLAGS;
	u32 step, *callback;
	struct owner owner;
	struct vma vma;
	bool hit;

	if (!all)
		return 0;
	read_vma(&vma, address);
	read_owner(&owner, VM_MM(&vma));
	if (!is_wanted(&owner))
		return 0;
	if (walk) {
		step = KV_STEP + walk->callback * KV_STEPS;
		/* Without its lock, a folio's mapping may be gone by now. */
		flags = walk->flags;
	} else {
		/* What walks has no probe here. */
		function = bpf_get_func_ip(ctx);
		callback = callbacks.lookup(&function);
		if (!callback) {
			count(all, KV_LOST_STEPS);
			return 0;
		}
		step = KV_STEP + *callback * KV_STEPS;
	}
	if (flags != MAPPING_ANON) {
		count(all, step + (flags == MAPPING_KSM ? KV_STEP_KSM : KV_STEP_FILE));
		if (walk)
			walk->others++;
		return 0;
	}

	hit = in_place(&vma);
	count(all, step + (hit ? KV_STEP_HIT : KV_STEP_FALLBACK));
	count_process(all, &owner, hit ? KV_PROCESS_RMAP_HIT : KV_PROCESS_RMAP_FALLBACK, hit);
	if (walk) {
		if (hit)
			walk->hits++;
		else
			walk->fallbacks++;
	}
	if ((mapping & ~(u64)MAPPING_FLAGS) != ANON_VMA(&vma))
		count(all, KV_LABEL_SHARED);

	index = read_u64(folio + KV_FOLIO_INDEX);
	if (!hit) {
		count(all, fallback_reason(&vma, address));
		if (PAGE_OF(VM_START(&vma)) <= index && index < PAGE_OF(VM_END(&vma)))
			count(all, KV_LABEL_ALIAS);
#ifdef KV_STACKS
		count_fallback(&vma);
#endif
	}
	/* mm/internal.h, vma_anon_address() */
	base = anon_pgoff(&vma);
	expected = VM_START(&vma) + (index >= base ? (index - base) << KV_PAGE_SHIFT : 0);
	assert_equal(ctx, all, KV_RMAP_ADDRESS, &owner, &vma, at, expected, at);
	return 0;
}
