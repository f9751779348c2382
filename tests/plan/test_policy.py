"""The peak of a step is the highest of its moments, and policies are ordered as they should be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.plan.policy import NEAR_LAYERS, UNDER_WAY, ActivationPolicy, Peak, StepCost, peak

# Four layers. By hand: what recomputed layers keep is 10 + 1 each, a saved one 100.
COST = StepCost(
    layers=4,
    input=10,
    part_input=10,
    lora=1,
    saved=100,
    attention=7,
    attention_part=7,
    forward=20,
    forward_saved=15,
    backward=150,
    saved_part=85,
    loss=30,
    layer_args=5,
    decoded=50,
)
RECOMPUTED, SAVED, MIXED = ActivationPolicy(), ActivationPolicy(4), ActivationPolicy(1)
OFFLOADED = ActivationPolicy(0, 3)
CHECKPOINTED = ActivationPolicy(0, 3, 3)
SOME_CHECKPOINTED = ActivationPolicy(0, 3, 2)
BOTH = ActivationPolicy(1, 2)
BOTH_CHECKPOINTED = ActivationPolicy(1, 2, 2)
ALL = [RECOMPUTED, MIXED, SAVED, OFFLOADED, BOTH, CHECKPOINTED, BOTH_CHECKPOINTED]


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        # Kept, then: forward's 20 and its output; the loss' 30 and the last output; the gradient
        # and 150 - 85 in a saved layer, and 150 in a recomputed one, when saved ones are gone. The
        # forward of a saved layer has 15 beside what it keeps.
        (RECOMPUTED, (44 + 30, 44 + 40, 44 + 160)),
        (MIXED, (133 + 25, 133 + 40, 133 + 75, 33 + 160)),
        (SAVED, (400 + 25, 400 + 40, 400 + 75)),
        # Two inputs on the device, one of them on its way, and what went into layer 0 as long as
        # the pass over the layers.
        (OFFLOADED, (24 + 10 + 30, 24 + 40, 24 + 10 + 160)),
        # All that leaves has left when the forward comes to a saved layer.
        (BOTH, (113 + 10 + 25, 123 + 40, 123 + 10 + 75, 23 + 10 + 160)),
        # A checkpoint on its way in forward, and one more than the part's own in backward.
        (CHECKPOINTED, (24 + 10 + 30 + 7, 24 + 40, 24 + 10 + 160 + 7)),
        # Two layers on their way in forward, both with a checkpoint.
        (SOME_CHECKPOINTED, (24 + 10 + 30 + 10 + 14, 24 + 40, 24 + 10 + 160 + 7)),
        (BOTH_CHECKPOINTED, (113 + 10 + 25, 123 + 40, 123 + 10 + 75, 23 + 10 + 160 + 7)),
    ],
    ids=str,
)
def test_the_moments_of_an_eager_step(policy: ActivationPolicy, passes: tuple[int, ...]) -> None:
    highest = 50 + max(passes)
    assert peak(COST, policy, graphs=False) == Peak(highest, highest)


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        # The last output's place is there in all of forward, beside the output under way.
        (RECOMPUTED, (44 + 10 + 30, 44 + 160)),
        # In backward its gradient takes it, and beside layers that are recomputed when a gradient
        # has come through another, it is nobody's.
        (MIXED, (133 + 10 + 25, 133 + 75, 33 + 10 + 160)),
        (SAVED, (400 + 10 + 25, 400 + 75)),
        # The graphs' own input, too: what layer 0 keeps is away.
        (OFFLOADED, (24 + 20 + 30, 24 + 20 + 160)),
        (BOTH, (113 + 20 + 25, 123 + 10 + 75, 23 + 20 + 160)),
        (CHECKPOINTED, (24 + 20 + 30 + 7, 24 + 20 + 160 + 7)),
        (SOME_CHECKPOINTED, (24 + 20 + 30 + 10 + 14, 24 + 20 + 160 + 7)),
        (BOTH_CHECKPOINTED, (113 + 20 + 25, 123 + 10 + 75, 23 + 20 + 160 + 7)),
    ],
    ids=str,
)
def test_graphs_hold_what_goes_in_and_out_and_keep_their_memory(
    policy: ActivationPolicy, passes: tuple[int, ...]
) -> None:
    own = 50 + max(passes) + 5
    assert peak(COST, policy, graphs=True) == Peak(own, own + 30)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", ALL, ids=str)
def test_the_highest_moment_may_be_any(policy: ActivationPolicy, graphs: bool) -> None:
    """A thousand more in a moment is a thousand above what is beside it then."""
    kept, saved, leaves = COST.kept(policy), policy.saved > 0, policy.offloaded > 0
    entry, own, attention = 10 * leaves, 10 * graphs, 7 * (policy.attention_checkpoints > 0)

    def highest(**more: int) -> int:
        return peak(replace(COST, **more), policy, graphs=graphs).allocated

    # In forward: where layers are saved, what leaves has left, and theirs is the one that counts.
    beside = 50 + graphs * 5 + entry + own + 10
    of_saved, of_recomputed = highest(forward_saved=1015), highest(forward=1020)
    if saved:
        assert of_saved == beside + kept - 10 * leaves + 1015
        assert of_recomputed == highest()
    else:
        assert of_recomputed == beside + kept + attention + 1020
        assert of_saved == highest()
    # In backward: more than saved layers kept a part of, and more of which they kept that part.
    beside = 50 + graphs * 5 + entry + 10
    of_saved, of_recomputed = highest(saved_part=85 - 1000), highest(backward=1150, saved_part=1085)
    if saved:
        assert of_saved == beside + kept + 1000 + 150 - 85
    else:
        assert of_saved == highest()
    if policy != SAVED:
        last = own * (saved or leaves)
        assert of_recomputed == beside + COST.waiting(policy) + last + attention + 1150
    else:
        assert of_recomputed == highest()
    # While graphs' memory is not in use, a loss has only their input and output beside it.
    loss = peak(replace(COST, loss=1030), policy, graphs=graphs)
    assert loss.allocated == 50 + (20 + 5 if graphs else kept + 10) + 1030
    assert loss.reserved >= loss.allocated


def test_parts_that_wait_for_each_other_have_their_outputs_and_gradients_in_the_loss() -> None:
    three = replace(COST, input=30, saved=300, attention=21, loss=1000)
    # Of three parts: the outputs, and the gradients of two.
    assert peak(three, SAVED, graphs=False).allocated == 50 + 4 * 300 + 30 + 20 + 1000
    # In backward the checkpoints of two layers, but for the part's own, which others make.
    low = replace(three, loss=0)
    less, more = (peak(low, policy, graphs=False).allocated for policy in (OFFLOADED, CHECKPOINTED))
    assert more - less == 2 * 21 - 7


@pytest.mark.parametrize(("decoded", "buffers"), [(0, 1), (1, 2), (3, 4), (4, 4)])
@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_of_decoded_weights(decoded: int, buffers: int, graphs: bool) -> None:
    """Layers that keep none share one."""
    policy = ActivationPolicy(4, decoded=decoded)
    assert COST.buffers(policy) == 50 * buffers
    with_one, found = (peak(COST, each, graphs=graphs) for each in (SAVED, policy))
    assert found.allocated - with_one.allocated == 50 * (buffers - 1)
    assert found.reserved - with_one.reserved == 50 * (buffers - 1)
    plain = replace(COST, decoded=0)
    assert peak(plain, policy, graphs=graphs) == peak(plain, SAVED, graphs=graphs)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", [RECOMPUTED, MIXED, SAVED, OFFLOADED, BOTH], ids=str)
def test_products_with_a_stay_on_the_device_wherever_the_input_waits(
    policy: ActivationPolicy, graphs: bool
) -> None:
    without = replace(COST, lora=0)
    recomputed = COST.layers - policy.saved
    assert COST.kept(policy) - without.kept(policy) == recomputed
    assert COST.host_bytes(policy) == without.host_bytes(policy)
    # In the moments in which they are there; in SAVED, none.
    high, low = (replace(c, forward=1000, forward_saved=1000) for c in (COST, without))
    both = [peak(c, policy, graphs=graphs).reserved for c in (high, low)]
    assert both[0] - both[1] == recomputed


def test_what_waits_on_the_host() -> None:
    assert COST.host_bytes(MIXED) == 0
    assert COST.host_bytes(OFFLOADED) == 3 * 10
    assert COST.host_bytes(CHECKPOINTED) == 3 * (10 + 7)
    assert COST.host_bytes(BOTH) == 2 * 10


@pytest.mark.parametrize(
    ("policy", "inputs", "on_host"),
    [
        # Of 12 layers. Not offloaded: those kept, and the others of the last n; then fewer.
        (ActivationPolicy(every=3), 4 + 2, 0),
        (ActivationPolicy(every=5), max(3 + 1, 2 + 4), 0),
        (ActivationPolicy(every=12), 1 + 11, 0),
        (ActivationPolicy(3, every=3), 3 + 2, 0),
        # Offloaded: one kept and one under way in forward, n in backward.
        (ActivationPolicy.offloading(12, every=2), 2, 6),
        (ActivationPolicy.offloading(12, every=4), 4, 3),
        (ActivationPolicy.offloading(12, 12, every=4), 0, 0),
    ],
    ids=str,
)
def test_inputs_of_every_nth_layer(policy: ActivationPolicy, inputs: int, on_host: int) -> None:
    cost = replace(COST, layers=12)
    assert cost.waiting(policy) == inputs * cost.input
    assert cost.host_bytes(policy) == on_host * cost.input


def test_long_parts_are_freed_earlier_and_written_in_place() -> None:
    tiled = replace(COST, tiled=True, forward=0, loss=0)
    policy = ActivationPolicy.offloading(4)
    usual = peak(replace(tiled, tiled=False), policy, graphs=False).allocated
    # Not the input of layer 0, and the arguments of layers, which count for so many tokens.
    assert peak(tiled, policy, graphs=False).allocated == usual - 10 + 5
    usual = peak(replace(tiled, tiled=False), policy, graphs=True).allocated
    assert peak(tiled, policy, graphs=True).allocated == usual - 10


def test_offloading_leaves_what_is_near_the_saved_layers() -> None:
    assert ActivationPolicy.offloading(8) == ActivationPolicy(0, 8 - NEAR_LAYERS)
    assert ActivationPolicy.offloading(8, 3) == ActivationPolicy(3, 5 - NEAR_LAYERS)
    away = 5 - NEAR_LAYERS
    for share, count in ((1.0, away), (0.5, away // 2), (0.2, 0)):
        policy = ActivationPolicy.offloading(8, 3, checkpoint_share=share)
        assert policy == ActivationPolicy(3, away, count)
    # Where nothing leaves, nothing is left there.
    for saved in (8 - NEAR_LAYERS, 8):
        away = ActivationPolicy.offloading(8, saved, checkpoint_share=1.0)
        assert away == ActivationPolicy(saved)


def test_two_layers_leave_at_a_time_where_some_have_a_checkpoint() -> None:
    cost = replace(COST, backward=0, loss=0)
    least = peak(cost, OFFLOADED, graphs=False).allocated
    assert peak(cost, CHECKPOINTED, graphs=False).allocated == least + 7
    assert peak(cost, SOME_CHECKPOINTED, graphs=False).allocated == least + 10 + 14


def test_checkpoints_are_spread() -> None:
    def of(policy: ActivationPolicy) -> list[int]:
        return [layer for layer in range(10) if policy.checkpoints(layer)]

    assert of(ActivationPolicy(0, 8, 8)) == list(range(8))
    assert of(ActivationPolicy(0, 8, 4)) == [1, 3, 5, 7]
    assert of(ActivationPolicy(0, 8, 6)) == [1, 2, 3, 5, 6, 7]
    assert of(ActivationPolicy(0, 8, 1)) == [7]
    assert of(ActivationPolicy(0, 8)) == []
    assert of(ActivationPolicy(8)) == []


@pytest.mark.parametrize(
    ("policy", "summary"),
    [
        (ActivationPolicy(), "all recomputed"),
        (ActivationPolicy(3), "3 of 8 saved"),
        (ActivationPolicy(8), "all saved"),
        (ActivationPolicy(8, decoded=5), "all saved, 5 decoded"),
        (ActivationPolicy(0, 7), "offload"),
        (ActivationPolicy(0, 7, 7), "offload"),
        (ActivationPolicy(3, 4), "3 saved, offload"),
    ],
    ids=str,
)
def test_a_policy_in_a_few_words(policy: ActivationPolicy, summary: str) -> None:
    assert policy.summary(8) == summary


# --- for any cost ---------------------------------------------------------------------------------

sizes = st.integers(0, 1000)


@st.composite
def costs(draw: st.DrawFn, parts: int = 1) -> StepCost:
    """A step of parts that are alike; what layers keep is made of the same terms as in a layer."""
    part, lora, kept = draw(st.integers(1, 1000)), draw(sizes), draw(sizes)
    attention, copies = draw(sizes), draw(sizes)
    kept += 4 * part + attention  # outputs of norms, sums, and the MLP's, which are wider
    forward_saved = draw(sizes)
    return StepCost(
        layers=draw(st.integers(1, 40)),
        input=parts * part,
        part_input=part,
        lora=parts * lora,
        saved=parts * (part + lora + kept) + copies,
        attention=parts * attention,
        attention_part=attention,
        # All that the functions of a layer give: what it would keep, and no more beside that.
        forward=draw(st.integers(0, kept + forward_saved)),
        forward_saved=forward_saved,
        backward=kept + draw(sizes),
        saved_part=kept,
        loss=draw(sizes),
        layer_args=draw(sizes),
        decoded=draw(sizes),
    )


@given(cost=costs() | costs(3), offload=st.booleans(), attention=st.booleans())
def test_more_saved_layers_never_take_less_memory(
    cost: StepCost, offload: bool, attention: bool
) -> None:
    """But from none to one, where inputs leave: a saved layer leaves no checkpoint.

    And graphs hold more for the one of two layers that leaves than that gains.
    """
    attention = attention and offload
    offload = offload and cost.layers > 2

    def policy(saved: int) -> ActivationPolicy:
        if not offload:
            return ActivationPolicy(saved)
        return ActivationPolicy.offloading(cost.layers, saved, checkpoint_share=float(attention))

    for graphs in {False, cost.input == cost.part_input}:  # what is captured is one part
        found = [peak(cost, policy(n), graphs=graphs) for n in range(attention, cost.layers + 1)]
        for less, more in pairwise(found):
            assert less.allocated <= more.allocated
            assert less.reserved <= more.reserved


@given(cost=costs() | costs(3), saved=st.integers(0, 40))
def test_offloading_never_takes_more_on_the_device_than_recomputing(
    cost: StepCost, saved: int
) -> None:
    """If two or more leave, as what enters layer 0 is held, too; with graphs, three.

    There the last output has a place of its own as soon as one leaves or is saved.
    """
    saved = min(saved, cost.layers)
    away = ActivationPolicy.offloading(cost.layers, saved)
    stay = ActivationPolicy(saved)
    assert cost.kept(away) <= cost.kept(stay)
    left = away.offloaded - UNDER_WAY
    if left != 0:
        assert peak(cost, away, graphs=False).reserved <= peak(cost, stay, graphs=False).reserved
    if cost.input == cost.part_input and left != 0 and (left != 1 or saved):
        assert peak(cost, away, graphs=True).reserved <= peak(cost, stay, graphs=True).reserved
    # What attention leaves for its layer is there besides, of the layer and of the one before.
    checkpointed = replace(away, attention_checkpoints=away.offloaded)
    for graphs in (False, True):
        more = (
            peak(cost, checkpointed, graphs=graphs).reserved
            - peak(cost, away, graphs=graphs).reserved
        )
        assert 0 <= more <= 2 * cost.attention


@given(
    cost=costs(),
    saved=st.integers(0, 40),
    offload=st.booleans(),
    decoded=st.integers(0, 40),
)
def test_graphs_never_reserve_less_than_is_allocated(
    cost: StepCost, saved: int, offload: bool, decoded: int
) -> None:
    saved = min(saved, cost.layers)
    policy = ActivationPolicy(saved)
    if offload:
        policy = ActivationPolicy.offloading(cost.layers, saved, checkpoint_share=1.0)
    policy = replace(policy, decoded=min(decoded, saved))
    eager, graphs = (peak(cost, policy, graphs=captured) for captured in (False, True))
    assert eager.allocated == eager.reserved
    assert graphs.allocated <= graphs.reserved
    assert graphs.reserved >= eager.reserved
