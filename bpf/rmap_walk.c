/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * mm/rmap.c, rmap_walk(): what became of one walk over the VMAs of a folio. What is probed are the functions that
 * it calls, one for each kind of folio: compilers inline rmap_walk() itself into others of mm/rmap.c.
 */

struct walk {
	u32 flags; /* of folio->mapping */
	u32 callback;
	u32 hits;
	u32 fallbacks;
	u32 others;
};
BPF_HASH(walks, u64, struct walk);
/* The rmap_one() functions that have a probe, by address. */
BPF_HASH(callbacks, u64, u32, 256);
BPF_HASH(unprobed, u64, u64, 256);

static __always_inline void finish(struct counts *all, struct walk *walk)
{
	u32 vmas = walk->hits + walk->fallbacks, which, bucket;

#ifdef KV_FILTER
	if (!vmas && !walk->others)
		return;
#endif
	if (walk->flags == MAPPING_KSM)
		which = KV_WALK_KSM;
	else if (walk->flags != MAPPING_ANON)
		which = KV_WALK_FILE;
	else if (!vmas)
		which = KV_WALK_EMPTY;
	else if (!walk->fallbacks)
		which = KV_WALK_ALL_HIT;
	else if (!walk->hits)
		which = KV_WALK_ALL_FALLBACK;
	else
		which = KV_WALK_MIXED;
	count(all, which);
	if (!vmas)
		return;
	/* Up to 1, 2, 4, 8, ... VMAs. */
#pragma clang loop unroll(disable)
	for (bucket = 0; bucket < KV_VMAS_BUCKETS - 1 && vmas > 1U << bucket; bucket++)
		;
	count(all, KV_VMAS + bucket);
}

static __always_inline int begin(u32 flags, u64 rwc)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	u64 rmap_one = read_u64(rwc + KV_RWC_RMAP_ONE);
	struct walk *before = walks.lookup(&id);
	u32 *callback = callbacks.lookup(&rmap_one);
	struct walk walk = {};
	u64 none = 0, *n;

	if (!all)
		return 0;
	/* It returned unseen: more threads were in walks than the kernel had room to wait for. */
	if (before)
		finish(all, before);
	if (!callback) {
		walks.delete(&id);
		n = unprobed.lookup_or_try_init(&rmap_one, &none);
		if (n)
			lock_xadd(n, 1);
		else
			count(all, KV_LOST_WALKS);
		return 0;
	}
	walk.flags = flags;
	walk.callback = *callback;
	if (walks.update(&id, &walk))
		count(all, KV_LOST_WALKS);
	return 0;
}

#ifdef KV_ARG_RMAP_WALK_ANON_RWC
int enter_rmap_walk_anon(struct registers *ctx)
{
	return begin(MAPPING_ANON, ARGUMENT(ctx, RMAP_WALK_ANON, RWC));
}
#endif

#ifdef KV_ARG_RMAP_WALK_KSM_RWC
int enter_rmap_walk_ksm(struct registers *ctx)
{
	return begin(MAPPING_KSM, ARGUMENT(ctx, RMAP_WALK_KSM, RWC));
}
#endif

#ifdef KV_ARG_RMAP_WALK_FILE_RWC
/* __rmap_walk_file(), or where there is none rmap_walk_file(). */
int enter_rmap_walk_file(struct registers *ctx)
{
	return begin(0, ARGUMENT(ctx, RMAP_WALK_FILE, RWC));
}
#endif

int leave_rmap_walk(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct walk *walk = walks.lookup(&id);

	if (!all)
		return 0;
	if (!walk)
		return 0;
	finish(all, walk);
	walks.delete(&id);
	return 0;
}
