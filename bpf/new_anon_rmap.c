/* SPDX-License-Identifier: GPL-2.0-only */
/* mm/rmap.c, folio_add_new_anon_rmap() and hugetlb_add_new_anon_rmap(): the index that a folio is born with. */

struct new_anon {
	u64 folio;
	u64 vma;
	u64 address;
};
BPF_HASH(new_anons, u64, struct new_anon);

int enter_new_anon_rmap(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct new_anon call = {
		.folio = ARGUMENT_(ctx, 0),
		.vma = ARGUMENT_(ctx, 1),
		.address = ARGUMENT_(ctx, 2),
	};

	if (!all)
		return 0;
	if (new_anons.lookup(&id))
		count(all, KV_LOST_NEW_INDEX);
	if (new_anons.update(&id, &call))
		count(all, KV_LOST_NEW_INDEX);
	return 0;
}

int leave_new_anon_rmap(struct registers *ctx)
{
	struct counts *all = counters();
	u64 id = bpf_get_current_pid_tgid();
	struct new_anon *call = new_anons.lookup(&id);
	struct owner owner;
	struct vma vma;

	if (!all)
		return 0;
	if (!call)
		return 0;
	read_vma(&vma, call->vma);
	read_owner(&owner, VM_MM(&vma));
	if (is_wanted(&owner))
		/* include/linux/pagemap.h, linear_anon_page_index() */
		assert_equal(ctx, all, KV_NEW_INDEX, &owner, &vma, call->address,
			     anon_pgoff(&vma) + PAGE_OF(call->address - VM_START(&vma)),
			     read_u64(call->folio + KV_FOLIO_INDEX));
	new_anons.delete(&id);
	return 0;
}
