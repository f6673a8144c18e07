"""select() against brute force, and its edge cases."""

from itertools import chain, combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from hvp.common.hardviews import Group, Slots, combination_losses, gather_views, select

DINO = Slots.from_counts((2, 2, 5), (1, 1, 3))
ANY_PAIR = Slots.from_counts((4, 5), (2, 3))
PAIR = Slots.from_counts((4,), (2,))
IBOT = Slots.from_counts((4, 4), (2, 2), diagonal=True)
RELEASED = Slots((Group((0, 2), 1), Group((1, 3), 1), Group((4, 5, 6, 7, 8), 3)))
SLOTS = [DINO, ANY_PAIR, PAIR, IBOT, RELEASED]


def slow_loss(matrix: Tensor, combination: list[int], slots: Slots) -> float:
    """Objective of one image and one combination, written out."""
    targets = combination[: slots.num_targets]
    off = [float(matrix[t, v]) for i, t in enumerate(targets) for j, v in enumerate(combination) if i != j]
    loss = sum(off) / len(off)
    if slots.diagonal:
        loss += sum(float(matrix[t, t]) for t in targets) / len(targets)
    return loss


def slow_combinations(slots: Slots) -> list[list[int]]:
    choices = product(*(list(combinations(group.candidates, group.kept)) for group in slots.groups))
    return [list(chain.from_iterable(choice)) for choice in choices]


any_loss = st.floats(-100, 100, width=32)


def pair_losses(slots: Slots, elements: st.SearchStrategy = any_loss, batch: int = 3) -> st.SearchStrategy:
    shape = (batch, 4, slots.num_views)
    return hnp.arrays("float32", shape, elements=elements).map(torch.from_numpy)


slots_and_losses = st.sampled_from(SLOTS).flatmap(lambda slots: st.tuples(st.just(slots), pair_losses(slots)))


@given(slots_and_losses, st.sampled_from(["hardest", "easiest"]))
@settings(max_examples=60)
def test_exact_search_finds_what_brute_force_finds(case, policy):
    slots, losses = case
    kept = select([], losses, slots, search="exact", policy=policy)
    every = slow_combinations(slots)
    for b in range(len(losses)):
        brute = [slow_loss(losses[b], combination, slots) for combination in every]
        best = max(brute) if policy == "hardest" else min(brute)
        assert kept.index[b].tolist() in every
        assert float(kept.loss[b]) == pytest.approx(best, rel=1e-5, abs=1e-4)
        assert slow_loss(losses[b], kept.index[b].tolist(), slots) == pytest.approx(best, rel=1e-5, abs=1e-4)


@given(slots_and_losses)
@settings(max_examples=40)
def test_comparing_all_combinations_equals_the_exact_search(case):
    slots, losses = case
    exact = select([], losses, slots, search="exact")
    sampled = select([], losses, slots, search="sampled", comparisons=slots.num_combinations)
    torch.testing.assert_close(exact.loss, sampled.loss, rtol=1e-5, atol=1e-4)


@given(slots_and_losses, st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60)
def test_sampled_search_keeps_the_best_of_the_drawn_combinations(case, comparisons, per_image, seed):
    slots, losses = case
    if comparisons >= slots.num_combinations:
        comparisons = slots.num_combinations - 1
    shape = (len(losses), comparisons) if per_image else (comparisons,)
    drawn = slots.sample(shape, torch.Generator().manual_seed(seed))
    kept = select(
        [],
        losses,
        slots,
        comparisons=comparisons,
        per_image=per_image,
        generator=torch.Generator().manual_seed(seed),
    )
    for b in range(len(losses)):
        options = (drawn[b] if per_image else drawn).tolist()
        brute = [slow_loss(losses[b], combination, slots) for combination in options]
        assert kept.index[b].tolist() in options
        assert float(kept.loss[b]) == pytest.approx(max(brute), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("slots", SLOTS)
def test_enumeration_is_complete_and_in_order(slots):
    every = slots.all_combinations().tolist()
    assert every == slow_combinations(slots)
    assert len(every) == slots.num_combinations
    assert len({tuple(combination) for combination in every}) == len(every)


def test_number_of_combinations_in_the_paper():
    assert Slots.from_counts((4, 16), (2, 8)).num_combinations == 77_220  # C(4,2) C(16,8)
    assert Slots.from_counts((2, 2, 16), (1, 1, 8)).num_combinations == 51_480


def test_groups_that_keep_no_view_are_ignored():
    slots = Slots.from_counts((2, 2, 3), (1, 1, 0))
    assert slots == Slots.from_counts((2, 2), (1, 1))
    views = [torch.full((1, 1, 1, 1), float(v)) for v in range(4)] + [torch.full((1, 1, 2, 2), 9.0)] * 3
    kept = select(views, torch.arange(28.0).reshape(1, 4, 7), slots)
    assert [view.item() for view in kept.views] == kept.index[0].tolist()


@pytest.mark.parametrize("slots", SLOTS)
def test_sampling_is_uniform_over_all_combinations(slots):
    every = [tuple(combination) for combination in slow_combinations(slots)]
    draws = slots.sample((400 * len(every),), torch.Generator().manual_seed(0)).tolist()
    counts = dict.fromkeys(every, 0)
    for draw in draws:
        counts[tuple(draw)] += 1  # KeyError: not a combination
    # 400 expected each, standard deviation 20: five of them
    assert all(300 < count < 500 for count in counts.values())


@pytest.mark.parametrize("search", ["sampled", "exact"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("policy", ["hardest", "easiest"])
def test_ties_go_to_the_first_combination(slots, search, policy):
    losses = torch.full((2, 4, slots.num_views), -0.5)  # below zero: a search that starts at 0 would find nothing
    kept = select([], losses, slots, search=search, comparisons=10**6, policy=policy)
    assert kept.index.tolist() == [slow_combinations(slots)[0]] * 2


def test_ties_go_to_the_first_given_combination():
    given_combinations = torch.tensor([[1, 3, 4, 5, 6], [0, 2, 4, 5, 6]])
    losses = torch.zeros(2, 4, 9)
    assert select([], losses, DINO, combinations=given_combinations).index.tolist() == [[1, 3, 4, 5, 6]] * 2


bad_values = st.sampled_from([float("nan"), float("inf"), -float("inf")]) | st.floats(-5, 5, width=32)


@given(
    st.sampled_from(SLOTS).flatmap(lambda slots: st.tuples(st.just(slots), pair_losses(slots, elements=bad_values))),
    st.sampled_from(["sampled", "exact"]),
    st.sampled_from(["hardest", "easiest"]),
)
@settings(max_examples=80)
def test_non_finite_losses_never_win(case, search, policy):
    slots, losses = case
    kept = select([], losses, slots, search=search, comparisons=10**6, policy=policy)
    every = slow_combinations(slots)
    for b in range(len(losses)):
        brute = [slow_loss(losses[b], combination, slots) for combination in every]
        finite = [loss for loss in brute if abs(loss) < float("inf")]  # NaN compares false
        if finite:
            best = max(finite) if policy == "hardest" else min(finite)
            assert not kept.fallback[b]
            assert float(kept.loss[b]) == pytest.approx(best, rel=1e-5, abs=1e-4)
        else:
            assert kept.fallback[b]
            assert kept.index[b].tolist() == every[0]


def test_an_unused_diagonal_has_no_effect():
    losses = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0))
    spoiled = losses.clone()
    spoiled.diagonal(dim1=1, dim2=2).fill_(float("nan"))
    for search in ("sampled", "exact"):
        a = select([], losses, DINO, search=search, comparisons=10**6)
        b = select([], spoiled, DINO, search=search, comparisons=10**6)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.loss, b.loss)
        assert not b.fallback.any()


def test_random_policy_ignores_the_losses_and_differs_by_image():
    losses = torch.rand(64, 4, 9)
    a = select([], losses, DINO, policy="random", generator=torch.Generator().manual_seed(3))
    b = select([], -losses, DINO, policy="random", generator=torch.Generator().manual_seed(3))
    assert torch.equal(a.index, b.index)
    assert len({tuple(row) for row in a.index.tolist()}) > 10


def numbered_views(slots: Slots, batch: int) -> list[Tensor]:
    """Stacks of two resolutions whose pixels encode (view, image)."""
    numbers = torch.arange(slots.num_views)[:, None] * 100.0 + torch.arange(batch)
    large = numbers[:4, :, None, None, None].expand(-1, -1, 3, 4, 4)
    small = numbers[4:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    return [large, small] if len(small) else [large]


@pytest.mark.parametrize("slots", SLOTS)
def test_views_match_the_index(slots):
    losses = torch.rand(3, 4, slots.num_views, generator=torch.Generator().manual_seed(1))
    views = numbered_views(slots, 3)
    kept = select(views, losses, slots, search="exact")
    slot = 0
    for stack, size in zip(kept.views, (4, 2), strict=False):
        assert stack.shape[1:] == (3, 3, size, size)
        for view in stack:
            expected = kept.index[:, slot] * 100.0 + torch.arange(3)
            assert torch.equal(view, expected[:, None, None, None].expand_as(view))
            slot += 1
    assert slot == slots.num_slots


def test_single_views_come_back_as_single_views():
    losses = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(1))
    stacks = numbered_views(DINO, 3)
    single = [view for stack in stacks for view in stack]
    kept = select(single, losses, DINO, search="exact")
    expected = [view for stack in select(stacks, losses, DINO, search="exact").views for view in stack]
    assert len(kept.views) == DINO.num_slots
    assert all(torch.equal(a, b) for a, b in zip(kept.views, expected, strict=True))


def test_one_stack_needs_no_list():
    losses = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1))
    (stack,) = numbered_views(PAIR, 3)
    x1, x2 = select(stack, losses, PAIR, search="exact").views
    expected = select([stack], losses, PAIR, search="exact").views[0]
    assert torch.equal(torch.stack((x1, x2)), expected)
    # also if there is nothing to choose
    x1, x2 = select(stack[:2], losses[:, :2, :2], Slots.from_counts((2,), (2,))).views
    assert torch.equal(torch.stack((x1, x2)), stack[:2])


def test_one_combination_returns_the_views_untouched():
    slots = Slots.from_counts((1, 1, 5), (1, 1, 5))
    stacks = [torch.rand(2, 3, 3, 4, 4), torch.rand(5, 3, 3, 2, 2)]
    kept = select(stacks, torch.rand(3, 2, 7), slots)
    assert kept.index.tolist() == [list(range(7))] * 3
    assert all(a is b for a, b in zip(kept.views, stacks, strict=True))


def test_one_combination_of_some_views_still_picks_them():
    slots = Slots((Group((2,), 1), Group((0,), 1)))
    stack = torch.rand(3, 2, 3, 4, 4)
    kept = select([stack], torch.rand(2, 3, 3), slots)
    assert torch.equal(kept.views[0], stack[[2, 0]])


def test_selection_keeps_no_graph_and_takes_half_precision():
    losses = torch.rand(2, 4, 9, requires_grad=True)
    kept = select([], losses.to(torch.bfloat16), DINO)
    assert not kept.loss.requires_grad
    assert kept.loss.dtype == torch.float32


def test_combinations_per_image():
    losses = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    combos = torch.tensor([[[0, 1], [2, 3]], [[1, 2], [0, 3]]])
    values = combination_losses(losses, combos, PAIR)
    for b, c in product(range(2), range(2)):
        assert float(values[b, c]) == pytest.approx(slow_loss(losses[b], combos[b, c].tolist(), PAIR), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pair_loss": torch.rand(2, 4)}, r"\[B, T, V\]"),
        ({"pair_loss": torch.rand(2, 4, 8)}, r"\[2, 4, 8\].*views up to 8"),
        ({"pair_loss": torch.rand(2, 3, 9)}, "targets up to 3"),
        ({"pair_loss": [[0.0]]}, r"tensor \[B, T, V\], got \[\[float\]\]"),
        ({"views": [torch.rand(4, 3, 3, 4, 4), torch.rand(5, 3, 3, 2, 2)]}, r"must be one stack \[9, 2, C, H, W\]"),
        ({"views": [torch.rand(4, 2, 3, 4, 4)]}, "9 views in all"),
        ({"views": torch.rand(2, 9, 3, 4, 4)}, r"\[9, 2, C, H, W\].*got a tensor \[2, 9, 3, 4, 4\]"),
        ({"views": torch.rand(9, 3, 4, 4)}, r"got a tensor \[9, 3, 4, 4\]"),
        ({"views": torch.rand(18)}, r"got a tensor \[18\]"),
        ({"views": [torch.rand(2)] * 9}, r"of 9 views \[2, C, H, W\], got \[a tensor \[2\]"),
        ({"views": [torch.tensor(0.0)] * 9}, r"got \[a tensor \[\]"),
        ({"views": torch.rand(9, 2, 3, 4, 4).numpy()}, r"got ndarray \[9, 2, 3, 4, 4\]"),
        ({"views": None}, "got NoneType"),
        ({"slots": (4, 2)}, r"slots must be Slots, .* got \(4, 2\)"),
        ({"combinations": torch.zeros(3, 4, dtype=torch.int64)}, r"int64 \[C, 5\] or \[2, C, 5\], .* \[3, 4\]"),
        ({"combinations": torch.zeros(3, 3, 5, dtype=torch.int64)}, r"\[3, 3, 5\]"),
        ({"combinations": torch.zeros(0, 5, dtype=torch.int64)}, r"\[0, 5\]"),
        ({"combinations": torch.zeros(3, 5)}, r"got torch\.float32 \[3, 5\]"),
        ({"combinations": torch.tensor([[0, 1, 4, 5, 9]])}, r"views 0 to 9 .* \[2, 4, 9\]"),
        ({"combinations": torch.tensor([[0, 4, 5, 6, 7]])}, r"targets up to 4, .*\[2, 4, 9\]"),
        ({"combinations": torch.tensor([[-1, 1, 4, 5, 6]])}, "views -1 to 6"),
        ({"search": "all"}, "'sampled' and 'exact'"),
        ({"policy": "worst"}, "'hardest', 'easiest' and 'random'"),
        ({"comparisons": 0}, "at least 1 combination"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    good = {"views": [], "pair_loss": torch.rand(2, 4, 9), "slots": DINO}
    with pytest.raises(ValueError, match=message):
        select(**(good | arguments))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Group((0, 1), 3), "cannot keep 3 of 2"),
        (lambda: Group((0, 1), 0), "cannot keep 0 of 2"),
        (lambda: Group((0, 0), 1), "distinct"),
        (lambda: Slots((Group((0, 1), 1), Group((1, 2), 1))), "two groups"),
        (lambda: Slots.from_counts((4,), (3,)), "whole groups"),
        (lambda: Slots.from_counts(4, 2), r"such as \(4,\) and \(2,\), got 4 and 2"),  # type: ignore[arg-type]
        (lambda: Slots.from_counts((4, 4), (2,)), "2 candidate counts"),
        (lambda: gather_views([torch.rand(1, 2, 3, 4, 4)] * 4, torch.zeros(2, 2, dtype=torch.int64), PAIR), "mix two"),
    ],
)
def test_invalid_slots_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
