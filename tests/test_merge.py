"""merge_statistics: the statistics of several models from their state dicts, against those of all data at once."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runningbn import (
    Horizon,
    PreciseBatchNorm1d,
    PreciseBatchNorm2d,
    RunningBatchNorm,
    batchnormify,
    merge_statistics,
    update_bn_stats,
)
from runningbn.layers.buffers import CHECKPOINTED

C = 3
# Sums of some hundred float32 numbers of order 1 to 100, updated some dozen times.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
CUMULATIVE = pytest.mark.parametrize(
    "make",
    [
        lambda: PreciseBatchNorm1d(C, momentum=None),
        lambda: RunningBatchNorm(C, momentum=None),
        lambda: RunningBatchNorm(C, momentum=None, gradient="exact"),
    ],
    ids=["precise", "running", "exact"],
)


def data_of(client: int, n: int, dtype=torch.float32) -> torch.Tensor:
    """Each client has data of its own kind: mean and std differ between them, and between channels."""
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(n, C, generator=generator, dtype=torch.float64)
    return (x * (1 + client) + 5 * client + torch.arange(C)).to(dtype)


def trained(layer, data, batch=7):
    for x in data.split(batch):
        layer(x)
    return layer


def population(parts):
    """Mean, biased and unbiased variance of everything, float64."""
    whole = torch.cat([part.double() for part in parts])
    return whole.mean(0), whole.var(0, correction=0), whole.var(0, correction=1)


def statistics_of(layer):
    return {name: value for name, value in layer.state_dict().items() if name in _names(layer)}


def _names(layer):
    return (*CHECKPOINTED, "running_mean", "running_var", "num_batches_tracked")


# --------------------------------------------------------------------------------------------------------- our layers


@CUMULATIVE
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_split_over_clients_gives_what_one_gives_that_saw_all(make, data):
    sizes = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=6))
    batch = data.draw(st.integers(2, 20))
    parts = [data_of(client, n) for client, n in enumerate(sizes)]
    # A last batch of one element would be an error in PreciseBatchNorm.
    batches = [[x for x in part.split(batch) if len(x) > 1] for part in parts]
    seen = [torch.cat(some) for some in batches]
    layers = []
    for some in batches:
        layers.append(make())
        for x in some:
            layers[-1](x)
    merged = merge_statistics([layer.state_dict() for layer in layers])
    mean, biased, unbiased = population(seen)
    var = unbiased if isinstance(layers[0], PreciseBatchNorm1d) else biased
    if isinstance(layers[0], RunningBatchNorm) and sum(map(len, seen)) < 20:
        var = var.clamp_min(0.01)
    torch.testing.assert_close(merged["running_mean"].double(), mean, **CLOSE)
    torch.testing.assert_close(merged["running_var"].double(), var, rtol=1e-4, atol=1e-5)
    assert merged["samples"].tolist() == [sum(map(len, seen))] * C
    assert merged["num_batches_tracked"] == sum(map(len, batches))
    # Kish's number is the number of elements: all weigh alike.
    torch.testing.assert_close(
        (merged["count"].square() / merged["count_sqrs"]).double(),
        torch.full((C,), float(sum(map(len, seen)))).double(), **CLOSE,
    )  # fmt: skip


@CUMULATIVE
def test_training_goes_on_as_if_one_had_seen_all(make):
    parts = [data_of(client, n) for client, n in enumerate((70, 21, 140))]
    alone = trained(make(), torch.cat(parts))
    layer = make()
    states = [trained(make(), part).state_dict() for part in parts]
    layer.load_state_dict({**states[0], **merge_statistics(states)})
    more = data_of(3, 14)
    for _ in range(2):
        for name in ("count", "count_sqrs", "debias", "samples", "steps", "running_mean", "running_var"):
            torch.testing.assert_close(getattr(layer, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
        assert layer.num_batches_tracked == alone.num_batches_tracked
        trained(layer, more)
        trained(alone, more)


def test_merging_what_was_merged_is_merging_all():
    states = [trained(PreciseBatchNorm1d(C, momentum=None), data_of(k, 35 + 21 * k)).state_dict() for k in range(4)]
    at_once = merge_statistics(states)
    in_turns = merge_statistics([merge_statistics(states[:2]), merge_statistics(states[2:])])
    for name, value in at_once.items():
        if name in ("shift", "sums", "sqrs"):
            continue  # about other pivots
        torch.testing.assert_close(in_turns[name], value, **CLOSE)
    other_order = merge_statistics(states[::-1])
    torch.testing.assert_close(other_order["running_var"], at_once["running_var"], **CLOSE)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_no_digits_are_lost_where_means_are_far(offset):
    parts = [data_of(k, 56, torch.float64).float() + offset for k in range(3)]
    merged = merge_statistics([trained(PreciseBatchNorm1d(C, momentum=None), part).state_dict() for part in parts])
    mean, _, var = population(parts)
    torch.testing.assert_close(merged["running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged["running_var"].double(), var, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RunningBatchNorm(C, momentum=Horizon(samples=32)),
        lambda: RunningBatchNorm(C, momentum=0.1),
        lambda: PreciseBatchNorm1d(C),
    ],
)
@pytest.mark.parametrize("weights", [None, [1, 3], [100, 300], [0.0, 2.0]])
def test_moving_averages_are_mixed_by_their_weights(make, weights):
    """The mixture of two populations, by the weights that are given or by the effective numbers of elements."""
    layers = [trained(make(), data_of(k, 140)) for k in range(2)]
    merged = merge_statistics([layer.state_dict() for layer in layers], weights)
    means, variances, effective = [], [], []
    for layer in layers:
        count = layer.count.double()
        offset = layer.sums.double() / count
        means.append(layer.shift.double() + offset)
        variances.append(layer.sqrs.double() / count - offset.square())
        effective.append(count.square() / layer.count_sqrs.double())
    w = effective if weights is None else [torch.full((C,), float(x), dtype=torch.float64) for x in weights]
    share = [x / sum(w) for x in w]
    mean = sum(p * m for p, m in zip(share, means))
    var = sum(p * (v + (m - mean) ** 2) for p, m, v in zip(share, means, variances))
    if isinstance(layers[0], PreciseBatchNorm1d):
        var = var / (1 - merged["count_sqrs"].double() / merged["count"].double().square())
    torch.testing.assert_close(merged["running_mean"].double(), mean, **CLOSE)
    torch.testing.assert_close(merged["running_var"].double(), var, rtol=1e-4, atol=1e-5)
    assert merged["samples"].tolist() == [140 if weights == [0.0, 2.0] else 280] * C


def test_one_state_is_itself():
    layer = trained(RunningBatchNorm(C), data_of(1, 60))
    merged = merge_statistics([layer.state_dict()])
    assert set(merged) == set(_names(layer))
    for name in ("running_mean", "running_var", "count", "samples", "debias", "steps", "count_sqrs"):
        torch.testing.assert_close(merged[name], layer.state_dict()[name], **CLOSE)
        assert merged[name].dtype == layer.state_dict()[name].dtype


def test_what_states_have_in_common_counts_once_for_each_unless_it_is_reset():
    common, parts = data_of(5, 42), [data_of(k, 42) for k in range(2)]
    for reset, expected in ((True, parts), (False, [common, common, *parts])):
        states = []
        for part in parts:
            layer = trained(PreciseBatchNorm1d(C, momentum=None), common)
            if reset:
                layer.reset_running_stats()
            states.append(trained(layer, part).state_dict())
        merged = merge_statistics(states)
        mean, _, var = population(expected)
        torch.testing.assert_close(merged["running_mean"].double(), mean, **CLOSE)
        torch.testing.assert_close(merged["running_var"].double(), var, rtol=1e-4, atol=1e-5)


def test_many_rounds_without_a_reset_stay_finite():
    """Samples double in every round then, and are bounded by what counts as settled."""
    model = PreciseBatchNorm1d(C, momentum=None)
    for _ in range(140):
        states = [trained(copy.deepcopy(model), data_of(k, 7)).state_dict() for k in range(2)]
        model.load_state_dict({**states[0], **merge_statistics(states)})
    assert all(value.isfinite().all() for value in model.state_dict().values())
    mean, _, _ = population([data_of(k, 7) for k in range(2)])
    torch.testing.assert_close(model.running_mean.double(), mean, rtol=1e-3, atol=1e-3)


def test_a_client_that_saw_nothing_contributes_nothing():
    full = trained(PreciseBatchNorm1d(C, momentum=None), data_of(1, 60)).state_dict()
    empty = PreciseBatchNorm1d(C, momentum=None).state_dict()
    for states in ([full, empty], [empty, full], [empty, full, empty]):
        for weights in (None, [5] * len(states)):
            merged = merge_statistics(states, weights)
            torch.testing.assert_close(merged["running_mean"], full["running_mean"])
            torch.testing.assert_close(merged["running_var"], full["running_var"], **CLOSE)
            assert merged["steps"].tolist() == full["steps"].tolist()
    nothing = merge_statistics([empty, empty])
    assert nothing["running_mean"].tolist() == [0] * C
    assert nothing["running_var"].tolist() == [1] * C
    assert nothing["count"].tolist() == [0] * C


def test_a_channel_that_saw_nothing_in_one_client_is_of_the_others():
    layers = [PreciseBatchNorm1d(C, momentum=None) for _ in range(2)]
    x = data_of(0, 20)
    broken = x.clone()
    broken[0, 1] = math.nan
    layers[0](broken)
    layers[1](x + 7)
    merged = merge_statistics([layer.state_dict() for layer in layers])
    torch.testing.assert_close(merged["running_mean"][1], (x + 7).mean(0)[1])
    both, _, _ = population([x, x + 7])
    torch.testing.assert_close(merged["running_mean"][[0, 2]].double(), both[[0, 2]], **CLOSE)
    assert merged["samples"].tolist() == [40, 20, 40]


def test_statistics_that_were_taken_over_count_alike_or_as_is_said():
    """Clients that go on from one pretrained model: nobody knows how much it had seen."""
    start = nn.BatchNorm1d(C)
    start.load_state_dict({**start.state_dict(), "num_batches_tracked": torch.tensor(100)})
    layers = [trained(batchnormify(copy.deepcopy(start), "precise"), data_of(k, 140)) for k in range(2)]
    states = [layer.state_dict() for layer in layers]
    for weights, share in ((None, 0.5), ([1, 3], 0.75)):
        merged = merge_statistics(states, weights)
        expected = torch.lerp(*(state["running_mean"].double() for state in states), share)
        torch.testing.assert_close(merged["running_mean"].double(), expected, **CLOSE)
        assert merged["samples"].isfinite().all()
        assert merged["samples"].max() <= torch.finfo(torch.float32).max
        layer = copy.deepcopy(layers[0])
        layer.load_state_dict({**states[0], **merged})
        assert trained(layer, data_of(1, 20)).running_mean.isfinite().all()
    with pytest.raises(ValueError, match="unknown weight in some of the states"):
        merge_statistics([states[0], trained(PreciseBatchNorm1d(C), data_of(1, 20)).state_dict()])


def test_an_epoch_of_a_large_data_set_is_no_statistics_of_unknown_weight():
    states = [trained(PreciseBatchNorm1d(C), data_of(k, 140)).state_dict() for k in range(2)]
    expected = merge_statistics(states)
    states[0]["samples"].fill_(2e9)
    torch.testing.assert_close(merge_statistics(states)["running_mean"], expected["running_mean"], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- torch's layers


def test_layers_of_torch_from_mean_variance_and_number():
    """Exact statistics of two shards of unlike data, merged by the numbers of their elements."""
    parts = [data_of(0, 100), data_of(1, 300)]
    states = []
    for part in parts:
        layer = nn.BatchNorm1d(C)
        update_bn_stats(layer, part.split(20), num_iters=None)
        states.append(layer.state_dict())
    merged = merge_statistics(states, weights=[len(part) for part in parts])
    mean, biased, _ = population(parts)
    torch.testing.assert_close(merged["running_mean"].double(), mean, **CLOSE)
    # Each part's variance has its own n/(n - 1): at most 1/99 too large, of a part of the whole.
    assert (merged["running_var"] >= biased - 1e-4).all()
    assert (merged["running_var"] <= biased * 100 / 99).all()
    exact = sum(len(part) / 400 * (part.double().var(0) + (part.double().mean(0) - mean).square()) for part in parts)
    torch.testing.assert_close(merged["running_var"].double(), exact, **CLOSE)
    averaged = sum(state["running_var"] * len(part) / 400 for state, part in zip(states, parts))
    assert (averaged < 0.6 * merged["running_var"]).all()  # what lies between the clients


def test_layers_of_torch_count_alike_without_weights_and_fresh_ones_not():
    states = [
        {"n.running_mean": torch.tensor([x]), "n.running_var": torch.ones(1), "n.num_batches_tracked": torch.tensor(3)}
        for x in (2.0, 4.0)
    ]
    fresh = {f"n.{key}": value for key, value in nn.BatchNorm1d(1, affine=False).state_dict().items()}
    merged = merge_statistics([*states, fresh])
    assert {key: value.item() for key, value in merged.items()} == {
        "n.running_mean": 3, "n.running_var": 2, "n.num_batches_tracked": 6,
    }  # fmt: skip
    assert merged["n.num_batches_tracked"].dtype == torch.int64
    assert merge_statistics([fresh, fresh])["n.running_var"].item() == 1


def test_a_whole_model_and_what_is_not_statistics():
    def model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), RunningBatchNorm(4 * 36)).double()

    states = []
    for k in range(2):
        net = model()
        net(torch.randn(8, 3, 8, 8).double() + k)
        states.append(net.state_dict())
    merged = merge_statistics(states, [1, 1])
    prefixes = {key.partition(".")[0] for key in merged}
    assert prefixes == {"1", "3"}
    assert not any(key.endswith((".weight", ".bias", "noise", "sum_dy")) for key in merged)
    assert all(value.dtype == states[0][key].dtype for key, value in merged.items())
    assert model().load_state_dict({**states[0], **merged}) is not None
    # Without the rest of the state of our layer a strict load works, too, and begins its gradients anew.
    parameters = {key: value for key, value in states[0].items() if key.endswith(("weight", "bias"))}
    net = model()
    net.load_state_dict({**parameters, **merged})
    assert torch.equal(net[3].running_mean, merged["3.running_mean"])


def test_a_converted_model_merges_as_it_was_trained():
    nets = []
    for k in range(2):
        net = batchnormify(nn.Sequential(nn.BatchNorm2d(C)), "precise", momentum=None)
        net(torch.randn(4, C, 5, 5) + 10 * k)
        nets.append(net)
    merged = merge_statistics([net.state_dict() for net in nets])
    assert (merged["0.running_var"] > 20).all()
    target = nn.Sequential(PreciseBatchNorm2d(C, momentum=None))
    target.load_state_dict({**nets[0].state_dict(), **merged})
    plain = batchnormify(target, "torch")
    assert torch.equal(plain[0].running_var, merged["0.running_var"])


@pytest.mark.parametrize("change", [lambda state: {k: v.half() for k, v in state.items()}, lambda state: {
    k: v for k, v in state.items() if k != "count"}], ids=["16 bits", "incomplete"])  # fmt: skip
def test_a_state_that_a_load_would_not_take_over_is_mean_and_variance(change):
    states = [change(trained(PreciseBatchNorm1d(C), data_of(k, 70)).state_dict()) for k in range(2)]
    merged = merge_statistics(states)
    assert set(merged) == {"running_mean", "running_var", "num_batches_tracked"}
    means = [state["running_mean"].double() for state in states]
    torch.testing.assert_close(merged["running_mean"].double(), sum(means) / 2, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- errors


def plain(**changes):
    state = {f"0.{key}": value for key, value in nn.BatchNorm1d(C).state_dict().items()}
    state["0.running_mean"] = torch.arange(float(C))
    return {key: value for key, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "got none"),
        ([{}], "state 0 has no BatchNorm statistics"),
        ([plain(), {"0.weight": torch.ones(3)}], "state 1 has no BatchNorm statistics"),
        ([{"state_dict": plain()}], "state 0 has no BatchNorm statistics"),
        ([plain(), plain(), plain(**{"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)})],
         "state 0 has no '1.running_mean', which state 2 has"),
        ([plain(), plain(**{"0.num_batches_tracked": None})],
         "state 1 has no '0.num_batches_tracked', which state 0 has"),
        ([plain(), {f"module.{key}": value for key, value in plain().items()}],
         "state 1 has no '0.running_mean', which state 0 has"),
        ([plain(), {f"0.{k}": v for k, v in PreciseBatchNorm1d(C).state_dict().items()}],
         "state 0 has no '0.shift', which state 1 has"),
        ([plain(), plain(**{"0.running_mean": torch.zeros(4), "0.running_var": torch.ones(4)})],
         "'0.running_mean' has the shape (3,) in state 0 and (4,) in state 1"),
        ([plain(**{"0.running_mean": torch.zeros(3, 2)})], "expected values of the shape (C,)"),
        ([plain(**{"0.running_var": torch.ones(2)})], "got (3,) and (2,)"),
        ([plain(**{"0.running_mean": torch.zeros(3, device="meta")})], "expected values"),
        ([plain(), plain(**{"0.running_var": torch.tensor([1, math.nan, 1])})],
         "state 1, 0.running_var: expected finite numbers"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit(states, message):
    with pytest.raises(ValueError, match="merge_statistics: ") as raised:
        merge_statistics(states)
    assert message in str(raised.value)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, -1], [0, 0], [1, math.nan], [1, math.inf], []])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match=r"merge_statistics: .*weight"):
        merge_statistics([plain(), plain()], weights)


@pytest.mark.parametrize("states", [plain(), None, "state", nn.BatchNorm1d(3), [nn.BatchNorm1d(3)], [plain(), 3]])
def test_what_is_no_sequence_of_state_dicts(states):
    with pytest.raises(TypeError, match="expected a sequence of state dicts"):
        merge_statistics(states)


def test_a_state_with_weight_0_may_be_anything_and_nothing_given_is_changed():
    states = [plain(), plain(**{"0.running_var": torch.full((3,), math.nan)})]
    before = copy.deepcopy(states)
    merged = merge_statistics(states, [1, 0])
    assert torch.equal(merged["0.running_mean"], states[0]["0.running_mean"])
    assert merged["0.running_var"].isfinite().all()
    for state, copied in zip(states, before):
        for key, value in state.items():
            assert torch.equal(value.nan_to_num(), copied[key].nan_to_num())
    merged["0.running_mean"].zero_()
    assert torch.equal(states[0]["0.running_mean"], torch.arange(3.0))
