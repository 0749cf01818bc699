/* SPDX-License-Identifier: GPL-2.0-only */
/* mm/vma.c, vma_complete(): the two halves of a split VMA, before anybody else can see them. */

int enter_vma_complete(struct registers *ctx)
{
	struct counts *all = counters();
	u64 vp = ARGUMENT(ctx, VMA_COMPLETE, VP);
	u64 insert = read_u64(vp + KV_VP_INSERT);
	struct vma first, other, *low = &first, *high = &other;
	struct owner owner;

	if (!all || !insert)
		return 0;
	read_vma(&first, read_u64(vp + KV_VP_VMA));
	read_owner(&owner, VM_MM(&first));
	if (!is_wanted(&owner))
		return 0;
	read_vma(&other, insert);
	if (VM_END(high) == VM_START(low)) {
		low = &other;
		high = &first;
	}
	if (VM_END(low) == VM_START(high))
		assert_equal(ctx, all, KV_SPLIT_AP, &owner, high, VM_START(high),
			     anon_pgoff(low) + PAGE_OF(VM_END(low) - VM_START(low)), anon_pgoff(high));
	return 0;
}
