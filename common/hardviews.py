"""Hard view selection: which of an image's sampled views to train on.

HVP (*Beyond Random Augmentations: Pretraining with Hard Views*, ICLR 2025, arXiv:2310.03940) samples more views than
the objective needs, and trains each image on the combination with the highest loss under the current model. Every
objective here is a mean over pairs *(target view t, online view v)* of one image, so a method hands over one thing, its
**pair-loss matrix** ``L[b, t, v]``, and the loss of any combination is a sum of its entries.

Dimensions:
    B images, V views of each (the first T of them are also targets), S slots of a combination, C combinations, P terms
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, combinations, pairwise, product
from math import comb, prod
from typing import Literal

import torch
from torch import Tensor

Search = Literal["sampled", "exact"]
Policy = Literal["hardest", "easiest", "random"]


@dataclass(frozen=True)
class Group:
    """Consecutive slots of a combination, filled from the same candidates.

    A combination takes `kept` distinct views of `candidates` (indices into the V views) and puts them into the group's
    slots in the order in which they stand in `candidates`.
    """

    candidates: tuple[int, ...]
    kept: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= len(self.candidates):
            raise ValueError(f"Group: cannot keep {self.kept} of {len(self.candidates)} candidate views")
        if len(set(self.candidates)) != len(self.candidates) or min(self.candidates) < 0:
            raise ValueError(f"Group: candidates must be distinct view indices, got {self.candidates}")

    @cached_property
    def _columns(self) -> slice | list[int]:
        """The candidates as an index; a slice if they are consecutive, as it costs no copy."""
        first, last = self.candidates[0], self.candidates[-1]
        consecutive = self.candidates == tuple(range(first, last + 1))
        return slice(first, last + 1) if consecutive else list(self.candidates)

    def of(self, values: Tensor) -> Tensor:
        """Return the candidates' entries of `values` [..., V]: [..., n]."""
        return values[..., self._columns]

    def views_at(self, positions: Tensor) -> Tensor:
        """Turn positions among the candidates into view indices, int64."""
        if isinstance(self._columns, slice):
            return positions + self.candidates[0]
        return torch.tensor(self.candidates, device=positions.device)[positions]


@dataclass(frozen=True)
class Slots:
    """The layout of a combination of views, and the pair losses it adds up.

    The first `num_targets` slots hold views that are also targets (the teacher's global crops; both views of a pair).
    With t over those slots and v over all slots, a combination's loss is

        mean over t != v of L[t, v]    +  (only with `diagonal`)    mean over t of L[t, t]

    which is the objective itself: 2 (S - 1) cross-entropies for DINO, and a symmetric pair for S = 2. The diagonal is
    iBOT's masked-patch loss of a view against itself; without `diagonal` those entries are never read.
    """

    groups: tuple[Group, ...]
    num_targets: int = 2
    diagonal: bool = False

    def __post_init__(self) -> None:
        views = list(chain.from_iterable(group.candidates for group in self.groups))
        if len(set(views)) != len(views):
            raise ValueError(f"Slots: a view is a candidate in two groups: {self.groups}")
        ends = [0]
        for group in self.groups:
            ends.append(ends[-1] + group.kept)
        if self.num_targets not in ends[1:] or ends[-1] < 2:
            raise ValueError(
                f"Slots: the first {self.num_targets} slots must be whole groups of at least 2 slots, got {self.groups}"
            )

    @classmethod
    def from_counts(
        cls, candidates: Sequence[int], kept: Sequence[int], *, num_targets: int = 2, diagonal: bool = False
    ) -> "Slots":
        """Build groups over consecutive views: `from_counts((2, 2, 16), (1, 1, 8))` are DINO's slots with HVP.

        Candidates of which none is kept take no part: DINO may train without local crops.
        """
        if isinstance(candidates, int) or isinstance(kept, int):
            raise ValueError(
                f"Slots: candidates and kept need one count per group, such as (4,) and (2,), "
                f"got {candidates} and {kept}"
            )
        if len(candidates) != len(kept):
            raise ValueError(f"Slots: {len(candidates)} candidate counts but {len(kept)} kept counts")
        starts = [0]
        for count in candidates:
            starts.append(starts[-1] + count)
        groups = (Group(tuple(range(a, b)), k) for (a, b), k in zip(pairwise(starts), kept, strict=True) if k)
        return cls(tuple(groups), num_targets=num_targets, diagonal=diagonal)

    @cached_property
    def num_slots(self) -> int:
        return sum(group.kept for group in self.groups)

    @cached_property
    def num_views(self) -> int:
        """One more than the highest candidate index: the smallest V that `pair_loss` may have."""
        return 1 + max(max(group.candidates) for group in self.groups)

    @cached_property
    def num_combinations(self) -> int:
        return prod(comb(len(group.candidates), group.kept) for group in self.groups)

    @cached_property
    def target_groups(self) -> tuple[Group, ...]:
        """The groups that fill the first `num_targets` slots."""
        groups, filled = [], 0
        for group in self.groups:
            if filled == self.num_targets:
                break
            groups.append(group)
            filled += group.kept
        return tuple(groups)

    @cached_property
    def online_groups(self) -> tuple[Group, ...]:
        """The other groups, whose views are online views only (DINO's local crops)."""
        return self.groups[len(self.target_groups) :]

    @cached_property
    def target_choices(self) -> Tensor:
        """Every choice of views for the target slots, [C, num_targets] int64 on the CPU, in lexicographic order."""
        return _enumerate(self.target_groups)

    @cached_property
    def first_combination(self) -> Tensor:
        """The lexicographically first combination, [S] int64 on the CPU."""
        return torch.tensor([view for group in self.groups for view in group.candidates[: group.kept]])

    @cached_property
    def terms(self) -> list[tuple[int, int, float]]:
        """The P terms of a combination's loss: (slot of the target, slot of the online view, weight)."""
        targets = range(self.num_targets)
        off = [(t, v) for t in targets for v in range(self.num_slots) if t != v]
        terms = [(t, v, 1 / len(off)) for t, v in off]
        if self.diagonal:
            terms += [(t, t, 1 / self.num_targets) for t in targets]
        return terms

    def keeps_all(self, num_views: int) -> bool:
        """Whether the only combination is all views in their order, which leaves nothing to select."""
        views = chain.from_iterable(group.candidates for group in self.groups)
        return self.num_slots == num_views and list(views) == list(range(num_views))

    def all_combinations(self) -> Tensor:
        """List every combination, [C, S] int64 on the CPU, in lexicographic order of the candidates' positions."""
        return _enumerate(self.groups)

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw uniformly random combinations with replacement: [*shape, S] int64 on the generator's device."""
        device = generator.device if generator is not None else torch.device("cpu")
        columns = []
        for group in self.groups:
            keys = torch.rand(*shape, len(group.candidates), generator=generator, device=device)
            # the `kept` smallest of n independent keys are a uniformly random subset
            positions = keys.topk(group.kept, dim=-1, largest=False).indices.sort(dim=-1).values
            columns.append(group.views_at(positions))
        return torch.cat(columns, dim=-1)


@dataclass(frozen=True)
class Selection:
    """The result of `select()`."""

    index: Tensor
    """[B, S] int64: the view in each slot of each image."""

    loss: Tensor
    """[B] float32: the objective's loss of that combination, under the model that made `pair_loss`."""

    fallback: Tensor
    """[B] bool: `loss` is not finite. After a search this means that no combination's loss was finite, and the first
    combination was kept."""

    views: list[Tensor]
    """The kept views. For a list with one stack per resolution, one [kept, B, ...] each; for a single stack or for
    single views, S tensors [B, ...], so that `x1, x2 = kept.views` unpacks a pair."""


@torch.no_grad()
def select(
    views: Sequence[Tensor] | Tensor,
    pair_loss: Tensor,
    slots: Slots,
    *,
    search: Search = "sampled",
    comparisons: int = 128,
    per_image: bool = False,
    policy: Policy = "hardest",
    combinations: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Selection:
    """Keep, for every image of the batch, the combination of its views that the policy asks for.

    Args:
        views: the V sampled views of every image, in the order of the view indices. One stack [V, B, C, H, W]; if
            resolutions differ, a list with one stack [n, B, C, H, W] for each; or a list of single views [B, C, H, W]
            (runs of equal shape are stacked, which costs a copy). Empty: return the index alone.
        pair_loss: [B, T, V] float, the loss of online view v against target view t; higher is harder. The targets are
            the first T views, so T is V for a method whose views are all targets. Entries [b, t, t], a view against
            itself, are read only with `slots.diagonal`.
        slots: the views a combination may take, and the entries of `pair_loss` it adds up.
        search: `sampled` compares `comparisons` random combinations, or all of them if there are no more (the papers'
            procedure). `exact` finds the best of all combinations in closed form: for fixed targets the other views'
            terms are independent, so each group's best are its top entries of the column sums.
        comparisons: C, random combinations compared for an image; only `sampled` reads it.
        per_image: draw separate combinations for every image. False shares one list, as HVP's released code does.
        policy: `hardest` (HVP), `easiest` (the cooperative learner of the HVP paper's appendix G.2), `random` (control:
            a uniformly random combination for every image; `search` and the losses play no part).
        combinations: [C, S] or [B, C, S] int64 view indices to compare, instead of drawn ones.
        generator: source of randomness for sampling, on any device. None: the CPU's global one.

    Returns:
        The Selection. Among equal losses the first combination wins: in the order of `combinations`, of drawing, or,
        if all are compared, lexicographically. A combination with a non-finite term never wins; an image with no other
        keeps the first one and is marked in `fallback`. If all views are kept, they are returned unchanged.

    Raises:
        ValueError: the shapes do not fit together, `comparisons` is below 1, or `search` or `policy` is unknown.

    Example:
        Views of 32 images, four of each, and a cosine loss of every view against every other:

            views = torch.randn(4, 32, 3, 64, 64)
            z = F.normalize(encoder(views.flatten(0, 1)), dim=-1).unflatten(0, (4, 32))  # [4, 32, D]
            pair_loss = -torch.einsum("tbd,vbd->btv", z, z)  # [32, 4, 4]
            kept = select(views, pair_loss, Slots.from_counts((4,), (2,)))
            x1, x2 = kept.views  # [32, 3, 64, 64] each: every image's hardest pair

    Source: HVP Algorithm 1; the closed form is ours.
    """
    _check(views, pair_loss, slots, search, comparisons, policy, combinations)
    batch = len(pair_loss)
    pair_loss = pair_loss.float()
    if policy == "random":
        index = slots.sample((batch,), generator)
    elif slots.num_combinations == 1:
        index = slots.all_combinations().expand(batch, -1)
    else:
        # "Easiest" is "hardest" with the sign flipped. A non-finite loss never wins either way.
        gain = -pair_loss if policy == "easiest" else pair_loss
        gain = gain.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        if combinations is None and search == "exact":
            index = _search_exactly(gain, slots)
        else:
            if combinations is None:
                if comparisons >= slots.num_combinations:
                    combinations = slots.all_combinations()
                else:
                    combinations = slots.sample((batch, comparisons) if per_image else (comparisons,), generator)
            index = _best_of(gain, combinations.to(gain.device, non_blocking=True), slots)
    index = index.to(pair_loss.device)
    loss = combination_losses(pair_loss, index[:, None], slots)[:, 0]
    kept = list(views) if slots.keeps_all(pair_loss.shape[2]) else gather_views(views, index, slots)
    return Selection(index=index, loss=loss, fallback=~loss.isfinite(), views=kept)


def combination_losses(pair_loss: Tensor, combinations: Tensor, slots: Slots) -> Tensor:
    """Return the objective's loss for given combinations.

    Args:
        pair_loss: [B, T, V] float.
        combinations: [C, S] int64, shared by the images, or [B, C, S].
        slots: the entries a combination adds up, and their weights.

    Returns:
        [B, C], in the dtype of `pair_loss`.
    """
    target_slots, online_slots = _term_slots(slots, combinations.device)
    targets, online = combinations.index_select(-1, target_slots), combinations.index_select(-1, online_slots)
    entries = targets * pair_loss.shape[2] + online  # [(B,) C, P]
    flat = pair_loss.flatten(1)  # [B, T V]
    if combinations.dim() == 2:
        values = flat.index_select(1, entries.flatten()).unflatten(1, entries.shape)
    else:
        values = flat.gather(1, entries.flatten(1)).unflatten(1, entries.shape[1:])
    weights = [weight for _, _, weight in slots.terms]
    if len(set(weights)) == 1:
        return values.sum(2) * weights[0]
    return (values * values.new_tensor(weights)).sum(2)


def gather_views(views: Sequence[Tensor] | Tensor, index: Tensor, slots: Slots) -> list[Tensor]:
    """Gather the kept views, with one indexing operation per resolution.

    Args:
        views: as for `select()`.
        index: [B, S] int64, the view in each slot.
        slots: its groups must not mix resolutions.

    Returns:
        As `Selection.views`: for a list of stacks one [kept, B, ...] each, otherwise S tensors [B, ...].

    Raises:
        ValueError: a group mixes two resolutions.
    """
    if not len(views):
        return []
    single = isinstance(views, Tensor) or views[0].dim() == 4
    if isinstance(views, Tensor):
        stacks = [views]
    else:
        stacks = _stacked(views) if single else list(views)
    kept: list[Tensor] = []
    first_view = first_slot = 0
    for stack in stacks:
        end_view = first_view + len(stack)
        end_slot = first_slot
        for group in slots.groups:
            inside = [first_view <= view < end_view for view in group.candidates]
            if any(inside) and not all(inside):
                raise ValueError(f"gather_views: the candidates {group.candidates} mix two resolutions")
            end_slot += group.kept if all(inside) else 0
        if end_slot > first_slot:
            # views are [n, B, ...]: row view * B + image of the flattened stack
            rows = (index[:, first_slot:end_slot] - first_view) * stack.shape[1]
            rows = rows + torch.arange(stack.shape[1], device=index.device)[:, None]
            picked = stack.flatten(0, 1)[rows.T.flatten()]
            kept.append(picked.unflatten(0, (end_slot - first_slot, stack.shape[1])))
        first_view, first_slot = end_view, end_slot
    return [view for stack in kept for view in stack] if single else kept


@lru_cache(maxsize=64)
def _term_slots(slots: Slots, device: torch.device) -> tuple[Tensor, Tensor]:
    """The slots of each term's target and online view, [P] int64 each; cached, as a copy to a GPU waits for it."""
    targets, online, _ = zip(*slots.terms, strict=True)
    return torch.tensor(targets, device=device), torch.tensor(online, device=device)


def _enumerate(groups: Sequence[Group]) -> Tensor:
    choices = product(*(combinations(group.candidates, group.kept) for group in groups))
    return torch.tensor([list(chain.from_iterable(choice)) for choice in choices], dtype=torch.int64)


def _best_of(gain: Tensor, combinations: Tensor, slots: Slots) -> Tensor:
    """Return the first combination with the highest gain for each image, [B, S]."""
    # argmax returns the first of equal maxima, and 0 if all are -inf
    best = combination_losses(gain, combinations, slots).argmax(dim=1)  # [B]
    if combinations.dim() == 2:
        return combinations[best]
    return combinations[torch.arange(len(best), device=best.device), best]


def _search_exactly(gain: Tensor, slots: Slots) -> Tensor:
    """Return the best of all combinations, [B, S]: try all choices of targets, each with its top online views.

    `gain` [B, T, V] is overwritten.
    """
    targets = slots.target_choices.to(gain.device)  # [C, num_targets]
    # Scale the diagonal by its weight relative to the other terms, so that all terms can be summed alike.
    diagonal = gain.diagonal(dim1=1, dim2=2)
    if slots.diagonal:
        diagonal *= slots.terms[-1][2] / slots.terms[0][2]
    else:
        diagonal.zero_()
    # Each view's contribution against these targets. The online slots' terms are independent of each other, so a
    # group's best views are the top ones.
    columns = gain.index_select(1, targets.flatten()).unflatten(1, targets.shape).sum(2)  # [B, C, V]
    total = columns.gather(2, targets.expand(len(gain), -1, -1)).sum(2)  # [B, C]
    tops = []
    for group in slots.online_groups:
        # a stable sort: among equal views the first candidates are taken
        values, order = group.of(columns).sort(dim=2, descending=True, stable=True)
        total = total + values[:, :, : group.kept].sum(2)
        tops.append(order[:, :, : group.kept])  # [B, C, kept]
    score, best = total.max(dim=1)  # [B]

    rows = torch.arange(len(gain), device=gain.device)
    picks = [targets[best]]
    for group, top in zip(slots.online_groups, tops, strict=True):
        picks.append(group.views_at(top[rows, best].sort(dim=1).values))  # [B, kept]
    index = torch.cat(picks, dim=1)
    found = score.isfinite()
    return torch.where(found[:, None], index, slots.first_combination.to(gain.device))


def _stacked(views: Sequence[Tensor]) -> list[Tensor]:
    """Stack each run of views of equal shape into one tensor [n, B, C, H, W]."""
    runs: list[list[Tensor]] = []
    for view in views:
        if runs and runs[-1][0].shape == view.shape:
            runs[-1].append(view)
        else:
            runs.append([view])
    return [torch.stack(run) for run in runs]


def _check(
    views: Sequence[Tensor] | Tensor,
    pair_loss: Tensor,
    slots: Slots,
    search: Search,
    comparisons: int,
    policy: Policy,
    combinations: Tensor | None,
) -> None:
    if not isinstance(slots, Slots):
        raise ValueError(f"select: slots must be Slots, such as Slots.from_counts((4,), (2,)), got {slots!r}")
    if not isinstance(pair_loss, Tensor) or pair_loss.dim() != 3:
        raise ValueError(f"select: pair_loss must be a tensor [B, T, V], got {_described(pair_loss)}")
    batch, targets, online = pair_loss.shape
    highest_target = max(max(group.candidates) for group in slots.target_groups)
    if slots.num_views > online or highest_target >= targets:
        raise ValueError(
            f"select: pair_loss [B, T, V] is {list(pair_loss.shape)}, but the slots take views up to "
            f"{slots.num_views - 1} and targets up to {highest_target}"
        )
    if not _holds(views, batch, online):
        raise ValueError(
            f"select: pair_loss [B, T, V] is {list(pair_loss.shape)}, so views must be one stack "
            f"[{online}, {batch}, C, H, W], a list of stacks [n, {batch}, C, H, W] of {online} views in all, or a list "
            f"of {online} views [{batch}, C, H, W], got {_described(views)}"
        )
    if search not in ("sampled", "exact"):
        raise ValueError(f"select: search is {search!r}, allowed are 'sampled' and 'exact'")
    if policy not in ("hardest", "easiest", "random"):
        raise ValueError(f"select: policy is {policy!r}, allowed are 'hardest', 'easiest' and 'random'")
    if comparisons < 1:
        # HVP's released DINO accepts 0, which compares nothing and trains on uninitialised memory.
        raise ValueError(f"select: comparisons is {comparisons}, but at least 1 combination must be compared")
    if combinations is not None:
        _check_combinations(combinations, pair_loss, slots)


def _check_combinations(combinations: Tensor, pair_loss: Tensor, slots: Slots) -> None:
    batch, targets, online = pair_loss.shape
    shape = list(combinations.shape)
    if (
        combinations.dtype != torch.int64
        or len(shape) not in (2, 3)
        or shape[-1] != slots.num_slots
        or (len(shape) == 3 and shape[0] != batch)
        or not combinations.numel()
    ):
        raise ValueError(
            f"select: combinations must be int64 [C, {slots.num_slots}] or [{batch}, C, {slots.num_slots}], got "
            f"{combinations.dtype} {shape}"
        )
    # an index past the end would read another pair's loss instead of failing
    low, high, highest_target = combinations.min(), combinations.max(), combinations[..., : slots.num_targets].max()
    if low < 0 or high >= online or highest_target >= targets:
        raise ValueError(
            f"select: combinations hold views {int(low)} to {int(high)} and targets up to {int(highest_target)}, but "
            f"pair_loss [B, T, V] is {list(pair_loss.shape)}"
        )


def _holds(views: Sequence[Tensor] | Tensor, batch: int, count: int) -> bool:
    """Whether `views` is empty, or holds `count` views of `batch` images."""
    if isinstance(views, Tensor):
        return views.dim() == 5 and views.shape[:2] == (count, batch)
    if not isinstance(views, Sequence) or not all(isinstance(view, Tensor) for view in views):
        return False
    dims = {view.dim() for view in views}
    if dims == {4}:
        return len(views) == count and all(len(view) == batch for view in views)
    return not views or (
        dims == {5} and sum(map(len, views)) == count and all(view.shape[1] == batch for view in views)
    )


def _described(value: object) -> str:
    """Describe a value for a message: the shape of a tensor, of each in a list, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    return f"{type(value).__name__} {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
