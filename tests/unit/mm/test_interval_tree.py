# SPDX-License-Identifier: GPL-2.0-only
"""Interval trees made up at random: what the kernel's search finds in them, and what damage does."""

import random
from functools import partial

import pytest

from kvirt.mm.interval_tree import (
    DEPTH_MAX,
    Interval,
    RbNode,
    Root,
    TreeError,
    climb,
    in_order,
    iter_intervals,
    rb_prev,
    subtree_last,
)


def made_up(generator, count):
    """A balanced tree of random intervals, as nodes in order and the root."""
    intervals = []
    for _ in range(count):
        start = generator.randrange(40)
        intervals.append((start, start + generator.randrange(12)))
    intervals.sort(key=lambda interval: interval[0])
    nodes = {}

    def build(low, high, parent):
        if low >= high:
            return 0, -1
        middle = (low + high) // 2
        address = 0x1000 + middle * 16
        start, last = intervals[middle]
        left, below_left = build(low, middle, address)
        right, below_right = build(middle + 1, high, address)
        below = max(last, below_left, below_right)
        nodes[address] = Interval(address, RbNode(parent, left, right, below), start, last)
        return address, below

    top, _ = build(0, count, 0)
    nodes = dict(sorted(nodes.items()))
    return nodes, Root(top, next(iter(nodes), 0))


def reader(nodes):
    def read(address):
        if address not in nodes:
            raise TreeError(f"nothing at {address:#x}")
        return nodes[address].rb

    return read


@pytest.mark.parametrize("seed", range(20))
def test_search_finds_what_is_there(seed):
    generator = random.Random(seed)
    nodes, root = made_up(generator, generator.randrange(30))
    for first in range(-2, 55):
        for last in range(first, 55, 7):
            expected = [n.address for n in nodes.values() if n.start <= last and first <= n.last]
            assert [n.address for n in iter_intervals(nodes, root, first, last)] == expected


@pytest.mark.parametrize("seed", range(20))
def test_walks_keep_the_order(seed):
    generator = random.Random(seed)
    nodes, root = made_up(generator, generator.randrange(30))
    read = reader(nodes)
    order = list(nodes)
    assert list(in_order(read, root, 100)) == order
    for before, address in zip([0, *order], order, strict=False):
        climb(read, root, address)
        assert rb_prev(read, address) == before
        node = nodes[address]
        assert subtree_last(read, node.rb, node.last) == node.rb.subtree_last


def damaged(generator, nodes):
    """The same tree with one pointer or bound changed."""
    address = generator.choice(list(nodes))
    node = nodes[address]
    wild = generator.choice([0, 0xDEAD, address, *nodes])
    parts = {name: getattr(node.rb, name) for name in ("parent", "left", "right", "subtree_last")}
    name = generator.choice(list(parts))
    parts[name] = generator.randrange(60) if name == "subtree_last" else wild
    return {**nodes, address: Interval(address, RbNode(**parts), node.start, node.last)}


def consume(walk):
    return list(walk)


def prev(read, root, address):
    return rb_prev(read, address)


def test_damage_ends_every_walk():
    troubles = missed = 0
    for seed in range(500):
        generator = random.Random(seed)
        sound, root = made_up(generator, generator.randrange(1, 30))
        nodes = damaged(generator, sound)
        read = reader(nodes)
        walks = [partial(consume, in_order(read, root, 100))]
        walks += [partial(walk, read, root, address) for walk in (climb, prev) for address in nodes]
        for walk in walks:
            try:
                walk()
            except TreeError as error:
                troubles += 1
                assert str(error)
        for index in range(55):
            found = {n.address for n in iter_intervals(nodes, root, index, index)}
            assert found <= set(nodes)
            missed += found != {n.address for n in iter_intervals(sound, root, index, index)}
    assert troubles > 100
    assert missed > 100


def test_trees_have_an_end():
    deep = {i: RbNode(0, i + 1, 0, 0) for i in range(1, 10_000)}
    with pytest.raises(TreeError, match="deeper than"):
        list(in_order(deep.__getitem__, Root(1, 1), 10_000))
    circle = {1: RbNode(2, 2, 0, 0), 2: RbNode(1, 1, 0, 0)}
    with pytest.raises(TreeError, match="twice"):
        list(in_order(circle.__getitem__, Root(1, 1), 10))
    with pytest.raises(TreeError, match="circle"):
        climb(circle.__getitem__, Root(1, 1), 2)
    assert DEPTH_MAX < 1000


def test_a_tree_has_all_of_its_ancestors():
    nodes, root = made_up(random.Random(1), 9)
    read = reader(nodes)
    with pytest.raises(TreeError, match="not the root"):
        climb(read, Root(root.leftmost, root.leftmost), root.node)
    with pytest.raises(TreeError, match="which is empty"):
        climb(read, Root(0, 0), root.node)
    top = nodes[root.node]
    nodes[root.node] = Interval(top.address, RbNode(0, 0, top.rb.right, 0), top.start, top.last)
    with pytest.raises(TreeError, match="not a child"):
        climb(read, root, top.rb.left)
