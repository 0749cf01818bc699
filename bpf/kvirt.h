/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What all programs share: reading VMAs, folios and anon_vmas at the offsets that were passed as
 * constants (KV_*), counting, whose VMA it is, and reports of assertions that do not hold.
 *
 * No header of the kernel is included: the programs compile in a fraction of the time, and on kernels whose
 * headers this compiler could not read. Counters and their names: kvirt/trace/program.py.
 */
#define STACK_DEPTH 32
/* bcc takes it for the size of ring buffers. */
#ifndef PAGE_SIZE
#define PAGE_SIZE (1 << KV_PAGE_SHIFT)
#endif
/* And this for tables of stacks, which have a power of two here. */
#ifndef roundup_pow_of_two
#define roundup_pow_of_two(n) (n)
#endif
/* Where bcc does not see the kernel's symbols, it puts bpf_probe_read() in its place. */
#undef bpf_probe_read_kernel
/* FOLIO_MAPPING_FLAGS, include/linux/page-flags.h: 1 anonymous, 3 KSM, 0 of a file. */
#define MAPPING_FLAGS 3
#define MAPPING_ANON 1
#define MAPPING_KSM 3

/* One for each processor, so that nothing is lost between two of them. */
struct counts {
	u64 n[KV_COUNTERS];
};
BPF_PERCPU_ARRAY(counts, struct counts, 1);

static __always_inline struct counts *counters(void)
{
	u32 zero = 0;

	return counts.lookup(&zero);
}

static __always_inline void count(struct counts *all, u32 which)
{
	/* The size is a power of two, so that the kernel's verifier can see that this stays inside. */
	all->n[which & (KV_COUNTERS - 1)]++;
}

static __always_inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

static __always_inline u32 read_u32(u64 address)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/* The beginning of a struct vm_area_struct: one read, where single members would take nine. */
struct vma {
	u64 raw[KV_VMA_SIZE / 8];
};

static __always_inline void read_vma(struct vma *vma, u64 address)
{
	bpf_probe_read_kernel(vma, sizeof(*vma), (void *)address);
}

#define MEMBER(vma, offset) (*(u64 *)((char *)(vma)->raw + (offset)))
#define MEMBER32(vma, offset) (*(u32 *)((char *)(vma)->raw + (offset)))
#define VM_START(vma) MEMBER(vma, KV_VMA_START)
#define VM_END(vma) MEMBER(vma, KV_VMA_END)
#define VM_MM(vma) MEMBER(vma, KV_VMA_MM)
#define VM_FLAGS(vma) MEMBER(vma, KV_VMA_FLAGS)
#define VM_OPS(vma) MEMBER(vma, KV_VMA_OPS)
#define VM_FILE(vma) MEMBER(vma, KV_VMA_FILE)
#define ANON_VMA(vma) MEMBER(vma, KV_VMA_ANON_VMA)

#define PAGE_OF(address) ((address) >> KV_PAGE_SHIFT)

/* The page offset that indexes anonymous folios: include/linux/mm.h, vma_start_anon_pgoff(). */
static __always_inline u64 anon_pgoff(struct vma *vma)
{
#if KV_LEGACY
	return MEMBER(vma, KV_VMA_PGOFF);
#else
	return (u64)MEMBER32(vma, KV_VMA_ANON_HI) << 32 | MEMBER32(vma, KV_VMA_ANON_LO);
#endif
}

/* Whether a folio's index times the page size is the address it is mapped at: the fast path's lookup. */
static __always_inline bool in_place(struct vma *vma)
{
	return anon_pgoff(vma) == PAGE_OF(VM_START(vma));
}

/* mm/vma.h, vma_is_cow_mapping(): whether it can have anonymous folios. */
static __always_inline bool is_cow(struct vma *vma)
{
	return (VM_FLAGS(vma) & (KV_VM_SHARED | KV_VM_MAYWRITE)) == KV_VM_MAYWRITE;
}

/* include/linux/mm.h, vma_is_anonymous() */
static __always_inline bool is_anonymous(struct vma *vma)
{
	return !VM_OPS(vma);
}

/* Whether folios of this anon_vma may be mapped by other processes: its family is more than itself. */
static __always_inline bool has_family(u64 anon_vma)
{
	u64 root = read_u64(anon_vma + KV_ANON_VMA_ROOT);

	return root != anon_vma || read_u64(root + KV_ANON_VMA_CHILDREN) > 1;
}

/* include/linux/list.h, list_is_singular() on anon_vma_chain of the VMA at this address */
static __always_inline bool is_chain_singular(struct vma *vma, u64 address)
{
	u64 next = MEMBER(vma, KV_VMA_CHAIN), prev = MEMBER(vma, KV_VMA_CHAIN + 8);

	return next == prev && next != address + KV_VMA_CHAIN;
}

/* The process that owns an address space. */
struct owner {
	u64 task;
	u32 tgid;
};

static __always_inline void read_owner(struct owner *owner, u64 mm)
{
#ifdef KV_MM_OWNER
	owner->task = read_u64(mm + KV_MM_OWNER);
	owner->tgid = owner->task ? read_u32(owner->task + KV_TASK_TGID) : 0;
#else
	owner->task = 0;
	owner->tgid = 0;
#endif
}

#ifdef KV_FILTER_FAMILY
BPF_HASH(family, u32, u8, 65536);
#endif

#ifdef KV_FILTER_COMM
/* A glob as a machine of 64 states: see kvirt/trace/filters.py. */
BPF_ARRAY(glob, u64, 256);

static __always_inline bool comm_matches(u64 task)
{
	unsigned char comm[16] = {};
	u64 states = KV_GLOB_START;
	int i;

	bpf_probe_read_kernel(comm, sizeof(comm), (void *)(task + KV_TASK_COMM));
#pragma unroll
	for (i = 0; i < 16; i++) {
		u32 byte = comm[i];
		u64 *mask;

		if (!byte)
			break;
		mask = glob.lookup(&byte);
		if (!mask)
			return false;
		states = (states & *mask) << 1 | (states & KV_GLOB_STARS);
	}
	return states & KV_GLOB_ACCEPT;
}
#endif

#ifdef KV_FILTER_CGROUP
/* kernel/cgroup/cgroup.c, task_dfl_cgroup() and cgroup_is_descendant() */
static __always_inline bool cgroup_matches(u64 task)
{
	u64 set = read_u64(task + KV_TASK_CGROUPS);
	u64 cgroup = read_u64(set + KV_CSS_SET_CGROUP);
	u64 ancestor, node;

	if ((int)read_u32(cgroup + KV_CGROUP_LEVEL) < KV_FILTER_CGROUP_LEVEL)
		return false;
	ancestor = read_u64(cgroup + KV_CGROUP_ANCESTORS + 8 * KV_FILTER_CGROUP_LEVEL);
	node = read_u64(ancestor + KV_CGROUP_KN);
	return read_u64(node + KV_KN_ID) == KV_FILTER_CGROUP;
}
#endif

/* Whether a process is one of those that are to be counted. */
static __always_inline bool is_wanted(struct owner *owner)
{
#ifdef KV_FILTER_PID
	if (owner->tgid != KV_FILTER_PID)
		return false;
#endif
#ifdef KV_FILTER_FAMILY
	if (!family.lookup(&owner->tgid))
		return false;
#endif
#ifdef KV_FILTER_COMM
	if (!owner->task || !comm_matches(owner->task))
		return false;
#endif
#ifdef KV_FILTER_CGROUP
	if (!owner->task || !cgroup_matches(owner->task))
		return false;
#endif
	return true;
}

/* Hits and fallbacks by process. */
struct process {
	u64 n[KV_PROCESS_COUNTERS];
	char comm[16];
};
BPF_HASH(processes, u32, struct process, KV_PROCESSES);

static __always_inline void count_process(struct counts *all, struct owner *owner, u32 which,
					  bool hit)
{
	struct process *process = processes.lookup(&owner->tgid);

	if (!process) {
		struct process new = {};

		processes.insert(&owner->tgid, &new);
		process = processes.lookup(&owner->tgid);
		if (!process) {
			count(all, KV_LOST_PROCESSES);
			return;
		}
		hit = false;
	}
	/* A name may change, by exec for one; those who fall back are those that are shown. */
	if (!hit && owner->task)
		bpf_probe_read_kernel(process->comm, sizeof(process->comm),
				      (void *)(owner->task + KV_TASK_COMM));
	if (which < KV_PROCESS_COUNTERS)
		lock_xadd(&process->n[which], 1);
}

#ifdef KV_STACKS
/* From where VMAs were displaced. Parts of a VMA and its copies in children keep both root and distance. */
struct displacer {
	u32 tgid;
	int user;
	int kernel;
	char comm[16];
};
struct displacement {
	u64 root;
	u64 distance;
};
struct displaced {
	u64 vmas;
	u64 fallbacks;
};
BPF_STACK_TRACE(stacks, 16384);
BPF_HASH(displacers, struct displacer, struct displaced);
BPF_HASH(displacements, struct displacement, struct displacer, 65536);

static __always_inline void name_displacement(struct displacement *key, struct vma *vma)
{
	key->root = read_u64(ANON_VMA(vma) + KV_ANON_VMA_ROOT);
	key->distance = anon_pgoff(vma) - PAGE_OF(VM_START(vma));
}

static __always_inline void count_fallback(struct vma *vma)
{
	struct displacement key = {};
	struct displacer *displacer;
	struct displaced *displaced;

	name_displacement(&key, vma);
	displacer = displacements.lookup(&key);
	if (!displacer)
		return;
	displaced = displacers.lookup(displacer);
	if (displaced)
		lock_xadd(&displaced->fallbacks, 1);
}
#endif

/* An assertion that did not hold. */
struct violation {
	u64 start;
	u64 end;
	u64 address;
	u64 expected;
	u64 actual;
	u64 stack[STACK_DEPTH];
	u32 assertion;
	u32 tgid;
	u32 tid;
	char comm[16];
	int depth;
};
BPF_RINGBUF_OUTPUT(violations, 64);

static __always_inline void assert_equal(void *ctx, struct counts *all, u32 assertion, struct owner *owner,
					 struct vma *vma, u64 address, u64 expected, u64 actual)
{
	struct violation *told;
	int size;

	if (expected == actual) {
		count(all, KV_OK + assertion);
		return;
	}
	count(all, KV_BAD + assertion);
	/* Whoever reads them must come to an end. */
	if (all->n[(KV_BAD + assertion) & (KV_COUNTERS - 1)] > KV_VIOLATIONS)
		told = NULL;
	else
		told = violations.ringbuf_reserve(sizeof(*told));
	if (!told) {
		count(all, KV_LOST_VIOLATIONS);
		return;
	}
	told->assertion = assertion;
	told->tgid = owner->tgid;
	told->tid = bpf_get_current_pid_tgid();
	told->start = VM_START(vma);
	told->end = VM_END(vma);
	told->address = address;
	told->expected = expected;
	told->actual = actual;
	__builtin_memset(told->comm, 0, sizeof(told->comm));
	if (owner->task)
		bpf_probe_read_kernel(told->comm, sizeof(told->comm), (void *)(owner->task + KV_TASK_COMM));
	size = bpf_get_stack(ctx, told->stack, sizeof(told->stack), 0);
	told->depth = size > 0 ? size / 8 : 0;
	violations.ringbuf_submit(told, 0);
}

/* struct pt_regs: the registers at a function's entry, or at its return. */
struct registers {
	u64 raw[KV_REGISTERS_SIZE / 8];
};
#define REGISTER(ctx, offset) ((ctx)->raw[(offset) / 8])
#define RETURNED(ctx) REGISTER(ctx, KV_REGISTER_RETURN)
/* The argument at a position that the kernel's type information gave. */
#define ARGUMENT__(ctx, position) REGISTER(ctx, KV_REGISTER_ARGUMENT_##position)
#define ARGUMENT_(ctx, position) ARGUMENT__(ctx, position)
#define ARGUMENT(ctx, function, role) ARGUMENT_(ctx, KV_ARG_##function##_##role)
