"""The benchmark on real images: its files, batches, networks and runs, on tiny files that are written here."""

from __future__ import annotations

import copy
import gzip
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pools import InThisProcess
from torch import nn

from benchmarks.accuracy import fashion, networks_real, pretrained, results, runner, series, tasks, tasks_real, train
from benchmarks.accuracy.contenders import BATCH_NORM, CONTENDERS, FINE_TUNED, OURS, OURS_CENTERED, REAL_CONTENDERS
from benchmarks.accuracy.conversions import to_running_centred
from benchmarks.accuracy.grid_real import CELLS, REAL_GRID, WIDER, common_rates, rates, trained_in
from benchmarks.accuracy.jobs import Grid, Job
from benchmarks.accuracy.networks import Site, build_stack
from benchmarks.accuracy.results import ONE_CLASS, SHUFFLED, STREAM, VIEWS, Cell
from benchmarks.accuracy.run import EVERYBODY, Run, run

TRAIN, TEST = 600, 100
TINY = Cell(tasks_real.RESIDUAL, 2, SHUFFLED, "AdamW", samples=8)
TINY_RATES, TINY_SEEDS = (0.001, 0.01), (0, 1)

NETWORKS = {
    networks_real.image_residual_net: 10,
    networks_real.image_residual_net_at_28: 10,
    networks_real.mobile_net: 17,
    networks_real.image_plain_net: 5,
    networks_real.pre_activation_net: 7,
    networks_real.image_perceptron: 3,
    networks_real.image_segmentation_net: 5,
    networks_real.series_net: 4,
    networks_real.deep_image_net: 50,
}
each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


def idx(array: np.ndarray, code: int = 0x08) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """As many images of each class: a square of the class's brightness at the class's place, in noise."""
    folder, random = tmp_path_factory.mktemp("fashion-mnist"), np.random.default_rng(0)
    for kind, number in (("train", TRAIN), ("t10k", TEST)):
        classes = random.permutation(np.arange(number) % 10)
        images = random.integers(0, 20, (number, 28, 28))
        for image, label in zip(images, classes, strict=True):
            image[2 + label : 14 + label, 4 + label : 16 + label] = 100 + 15 * label
        (folder / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(idx(classes))
    return folder


@pytest.fixture
def tiny_files(tiny_folder, monkeypatch):
    monkeypatch.setenv(fashion.VARIABLE, str(tiny_folder))
    return tiny_folder


@pytest.fixture
def cache(tmp_path_factory, tiny_files, monkeypatch):
    """One cache for all tests of this file, so that nothing is pretrained twice."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "runningbn-bench"


# ------------------------------------------------------------------------------------------------------------ the files


def test_an_idx_file_is_read_compressed_and_plain(tmp_path):
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "packed.gz"):
        assert torch.equal(fashion.read_idx(tmp_path / name), torch.from_numpy(array).byte())


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"\x08\x03" + idx(np.zeros((2, 2))), "begins with two zeros"),
        (b"", "begins with two zeros"),
        (idx(np.zeros((2, 2)), code=0x0D), "code 0x08, got code 0x0d"),
        (idx(np.zeros((2, 2)))[:-1], r"expected 16 bytes for sizes \[2, 2\], got 15"),
        (idx(np.zeros((2, 2))) + b"\0", r"got 17"),
        (idx(np.zeros((2, 2)))[:10], r"got 10"),
    ],
)
def test_a_file_that_is_no_idx_file_of_bytes_is_refused(tmp_path, contents, complaint):
    path = tmp_path / "bad"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=complaint):
        fashion.read_idx(path)


def test_missing_files_are_named_with_the_command_that_gets_them(tmp_path, monkeypatch):
    monkeypatch.setenv(fashion.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*apt-get install dataset-fashion-mnist"):
        fashion.check()
    with pytest.raises(FileNotFoundError, match="--data DIR"):
        fashion.garments()


def test_images_need_as_many_classes(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2)))
    with pytest.raises(ValueError, match=r"got \[3, 28, 28\] and \[2\]"):
        fashion.read("train", tmp_path)


def test_the_parts_are_of_the_right_files_and_standardised(tiny_files):
    fashion.check()
    data = fashion.garments()
    assert [len(part.inputs) for part in data] == [500, 100, 100]
    raw = fashion.raw_garments()
    images = fashion.read_idx(tiny_files / "train-images-idx3-ubyte.gz")
    assert torch.equal(raw.train.inputs[:, 0] * 255, images[:500].float())
    validated = {image.numpy().tobytes() for image in (raw.validation.inputs[:, 0] * 255).round().byte()}
    assert validated == {image.numpy().tobytes() for image in images[500:]}
    assert abs(data.train.inputs.mean()) < 1e-4
    assert data.train.inputs.std() == pytest.approx(1, abs=1e-4)


def test_series_are_windows_of_people_who_are_in_one_part_only(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    people = np.arange(10) + 1
    contents = {
        "X": [random.normal(person, 1 + np.arange(6), (192, 6)) for person in people],
        "y": people % 7, "subject": people,
    }  # fmt: skip
    path = tmp_path / "watch.npy"
    np.save(path, contents)
    monkeypatch.setattr(series, "file", lambda: path)
    data = series.watch.__wrapped__()
    assert [len(part.inputs) for part in data] == [18, 6, 6]  # three windows each
    assert data.train.inputs.shape[1:] == (6, 128)
    torch.testing.assert_close(data.train.inputs.std((0, 2)), torch.ones(6))
    # Each window but the last of a series goes on in another one, 32 times later.
    follows = [(first[:, 32:] == second[:, :-32]).all() for first in data.train.inputs for second in data.train.inputs]
    assert sum(follows) == 12
    assert sorted(data.test.labels.tolist()) == [2] * 3 + [3] * 3


# ---------------------------------------------------------------------------------------------------------- the batches


def test_views_are_shifted_images_and_a_batch_shows_one_of_them(tiny_files):
    views, plain = tasks_real.images(VIEWS).train, fashion.garments().train
    batches = tasks.schedule(views.classes, 4, VIEWS, 400, seed=0)
    assert batches.shape == (100, 4)
    assert (views.classes[batches] == views.classes[batches[:, :1]]).all()
    shifts = set()
    for view, number in zip(views.inputs[:24], views.classes[:24], strict=True):
        image = plain.inputs[number]
        middle = image[0, 6:22, 6:22]
        found = [(y, x) for y in range(-3, 4) for x in range(-3, 4)
                 if torch.equal(view[0, 6 + y : 22 + y, 6 + x : 22 + x], middle)]  # fmt: skip
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 12
    assert torch.equal(views.labels, plain.labels[views.classes])


def test_a_stream_stays_with_a_class_for_some_250_samples(tiny_files):
    classes = torch.arange(4000) % 10
    batches = tasks.schedule(classes, 4, STREAM, 5000, seed=0)
    assert batches.shape == (1250, 4)
    seen = classes[batches.flatten()]
    ends = (seen.diff() != 0).nonzero().flatten() + 1
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).diff()
    assert ((lengths >= 200) & (lengths <= 300)).all()
    assert 17 <= len(ends) + 1 <= 25
    assert len(seen[:3100].unique()) == 10  # all classes come before one comes again
    # Nothing comes twice before all of its class did.
    assert len(batches.flatten()[:2000].unique()) == 2000
    assert torch.equal(batches, tasks.schedule(classes, 4, STREAM, 5000, seed=0))
    assert not torch.equal(batches, tasks.schedule(classes, 4, STREAM, 5000, seed=1))


def test_batches_of_one_class(tiny_files):
    classes = fashion.garments().train.classes
    batches = tasks.schedule(classes, 32, ONE_CLASS, 640, seed=0)
    assert (classes[batches] == classes[batches[:, :1]]).all()
    assert len(classes[batches[:, 0]].unique()) > 5


def test_canvases_show_garments_in_their_quarters(tiny_files, monkeypatch):
    monkeypatch.setattr(tasks_real, "CANVASES", (20, 5, 5))
    data = tasks_real._canvases.__wrapped__(False, tiny_files)
    assert [len(part.inputs) for part in data] == [20, 5, 5]
    part = data.train
    assert part.inputs.shape == (20, 1, 64, 64)
    assert part.labels.shape == (20, 64, 64)
    for canvas in part.labels[:5]:
        quarters = canvas.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1).flatten(1)
        assert all(len(quarter.unique()) == 2 for quarter in quarters)  # a garment, and none around it
    # Noise is no garment, however bright it is beside the background.
    garment = part.labels != tasks.BACKGROUND
    assert part.inputs[:, 0][garment].min() > part.inputs[:, 0][~garment].max()
    assert garment[0].sum() == 4 * 12 * 12


# --------------------------------------------------------------------------------------------------------- the networks


def example(network, models: int = 1) -> torch.Tensor:
    shape = {networks_real.series_net: (6, 128), networks_real.image_segmentation_net: (1, 64, 64)}
    x = torch.randn((2, *shape.get(network, (1, 28, 28))), generator=torch.Generator().manual_seed(0))
    return torch.cat([x.double()] * models, 1)


@each_network
@pytest.mark.parametrize("name", ["GroupNorm", BATCH_NORM])
def test_a_stack_is_its_models(network, name):
    norm = REAL_CONTENDERS[name].norm(1)
    stack = build_stack(network, norm, seeds=(0, 7), copies=2).double()
    alone = build_stack(network, norm, seeds=(7,), copies=1).double()
    outputs = stack(example(network, models=4)).unflatten(1, (4, -1))
    for number in (1, 3):
        torch.testing.assert_close(outputs[:, number], alone(example(network)))
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])


@each_network
def test_networks_normalise_so_often_and_activate_where_they_say(network):
    sites: list[Site] = []

    def norm(site: Site) -> nn.Module:
        sites.append(site)
        return nn.Identity()

    net = network(1, norm)
    assert len(sites) == NETWORKS[network]
    assert any(site.activated for site in sites)
    squeezed = sum(isinstance(module, networks_real.SqueezeExcitation) for module in net.modules())
    assert sum(isinstance(module, nn.ReLU) for module in net.modules()) == squeezed  # all others are in the layers
    shape = net.double()(example(network)).shape
    assert shape == ((2, 11, 64, 64) if network is networks_real.image_segmentation_net else (2, 10, *shape[2:]))


def test_the_blocks_of_the_residual_net_are_on_maps_of_14_7_and_4():
    net = build_stack(networks_real.image_residual_net, REAL_CONTENDERS[BATCH_NORM].norm(1), (0,), 1)
    seen = []
    for module in net:
        if isinstance(module, networks_real.ProjectionBlock):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    net(torch.zeros(1, 1, 28, 28))
    assert seen == [(16, 14, 14), (32, 7, 7), (64, 4, 4)]


def test_convolutions_begin_with_the_std_of_he():
    torch.manual_seed(0)
    convolution, depthwise = networks_real.he_initialised(
        [nn.Conv2d(64, 32, 3, bias=True), nn.Conv2d(4096, 4096, 3, groups=4096, bias=False)]
    )
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.02)
    assert not convolution.bias.any()
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------- cells


def test_records_of_the_digits_still_load():
    old = {"task": "perceptron", "batch": 8, "one_class": True, "optimizer": "SGD"}
    assert Cell.of(old) == Cell("perceptron", 8, ONE_CLASS, "SGD", samples=1088)
    assert Cell.of(old | {"one_class": False}).batches == SHUFFLED
    for cell in (TINY, *CELLS):
        assert Cell.of(Job(cell, OURS, (0.1,), (0,)).record(OURS)) == cell
    committed = results.load(results.Path(__file__).parents[1] / "benchmarks" / "results" / "accuracy.jsonl")
    assert {cell.batches for cell in committed.cells()} == {SHUFFLED, ONE_CLASS}
    assert {cell.samples for cell in committed.cells()} == {results.DIGITS_SAMPLES}


def test_the_grid_has_every_cell_once_with_five_rates():
    assert len(set(CELLS)) == len(set(map(str, CELLS))) == len(CELLS)
    for cell in CELLS:
        assert cell.task in tasks_real.REAL_TASKS
        assert len(common_rates(cell)) == 5
        assert list(rates(cell)) == sorted({*common_rates(cell), *WIDER.get(cell, ())})
        assert OURS in {contender.name for contender in trained_in(cell)}
    assert {cell.batches for cell in CELLS} == {SHUFFLED, ONE_CLASS, VIEWS, STREAM}


def test_a_name_is_of_one_contender():
    for table in (CONTENDERS, REAL_CONTENDERS, FINE_TUNED):
        for name, contender in table.items():
            assert contender.name == name
            assert EVERYBODY[name] is contender


def test_part_of_a_grid():
    part = REAL_GRID.part("of a slow stream", [OURS, "MABN"])
    assert [str(cell) for cell in part.cells] == ["garments, residual net, batch 4 of a slow stream, AdamW"]
    assert [job.contender for job in part.pending(results.Results([]))] == [OURS, "MABN"]
    assert [job.rates for job in part.pending(results.Results([]))] == [rates(part.cells[0])] * 2
    with pytest.raises(ValueError, match="no cell with 'batch 5'"):
        REAL_GRID.part("batch 5")
    with pytest.raises(ValueError, match=r"unknown contenders \['MABM'\], expected some of \["):
        REAL_GRID.part(names=["MABM"])


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_cell_is_run_to_its_end_and_not_again(tmp_path, tiny_files, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    names = (BATCH_NORM, "GroupNorm")
    grid = Grid(
        "a test", (TINY,), lambda cell: TINY_RATES, lambda cell: [REAL_CONTENDERS[name] for name in names], TINY_SEEDS
    )
    path, said = tmp_path / "real_images.jsonl", []
    runner.run_missing(path, grid, jobs=1, budget=math.inf, say=said.append)
    assert len(said) == 3
    assert said[-1] == "complete"
    assert said[0].startswith("garments, residual net, batch 2, AdamW: BatchNorm, ")
    found = results.load(path)
    for name in (*names, "BatchNorm, update_bn_stats"):
        best = found.best(TINY, name)
        assert len(best.test) == 2
        assert best.rate in TINY_RATES
    runner.run_missing(path, grid, jobs=1, budget=math.inf, say=said.append)
    assert said[3:] == ["complete"]


def test_more_seeds_are_run_at_the_best_rate_only(tmp_path, tiny_files, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    grid = Grid(
        "a test", (TINY,), lambda cell: TINY_RATES, lambda cell: [REAL_CONTENDERS["GroupNorm"]], TINY_SEEDS,
        more_seeds=lambda cell: (2, 3, 4),
    )  # fmt: skip
    path, said = tmp_path / "real_images.jsonl", []
    runner.run_missing(path, grid, jobs=1, budget=math.inf, say=said.append)
    assert len(said) == 3
    assert said[-1] == "complete"
    found = results.load(path)
    best = found.best(TINY, "GroupNorm")
    assert {score.rate: len(score.test) for score in found.scores(TINY, "GroupNorm")} == {
        rate: 5 if rate == best.rate else 2 for rate in TINY_RATES
    }
    sweep, more = (record for record in results.records(path) if "part" not in record)
    assert best.test == (*sweep["test"][sweep["rates"].index(best.rate)], *more["test"][0])
    runner.run_missing(path, grid, jobs=1, budget=math.inf, say=said.append)
    assert said[3:] == ["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SHUFFLED, ONE_CLASS, VIEWS, STREAM])
def test_runs_of_all_kinds_are_the_same_every_time(tiny_files, kind):
    job = Job(replace(TINY, batches=kind), OURS, (0.003,), (0, 1))
    (first,), (again,) = run(job), run(job)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert np.shape(first["test"]) == np.shape(first["training_mode"]) == (1, 2)


def test_training_mode_is_scored_for_small_batches_of_layers_with_statistics(tiny_files):
    without, *_ = run(Job(TINY, "GroupNorm", (0.003,), (0,)))
    large, *_ = run(Job(replace(TINY, batch=4), OURS, (0.003,), (0,)))
    plain, recalibrated = run(Job(TINY, BATCH_NORM, (0.003,), (0,)))
    assert ["training_mode" in record for record in (without, large, plain, recalibrated)] == [
        False,
        False,
        True,
        False,
    ]


def test_scoring_in_training_mode_changes_nothing(tiny_files):
    this = Run.of(Job(TINY, OURS, (0.003,), (0, 1)))
    stack = this.stack(4).eval()
    before = copy.deepcopy(stack.state_dict())
    train.evaluate_as_trained(stack, this.task, this.data.test, 2, batch=2)
    assert not stack.training
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_diverged_model_does_not_keep_the_others_from_being_recalibrated(tiny_files):
    this = Run.of(Job(TINY, BATCH_NORM, (0.003, 0.01), (0, 1)))
    sound, diverged = this.stack(4), this.stack(4)
    with torch.no_grad():
        diverged[0].weight.view(4, -1)[2, 5] = math.nan
    for stack in (sound, diverged):
        train.recalibrate(stack, this.data.train, 4)
    for (name, ours), theirs in zip(diverged.state_dict().items(), sound.state_dict().values(), strict=True):
        if ours.dim():
            assert torch.equal(ours.view(4, -1)[[0, 1, 3]], theirs.view(4, -1)[[0, 1, 3]]), name
    assert diverged[0].weight.isnan().sum() == 1
    losses = this.scores(diverged)["loss"]
    assert [loss is None for row in losses for loss in row] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_CONTENDERS)
@pytest.mark.parametrize("task", [tasks_real.MOBILE, tasks_real.RESIDUAL])
def test_every_contender_runs(tiny_files, name, task):
    records = run(Job(replace(TINY, task=task, samples=4), name, (0.003,), (0, 1)))
    assert [record["contender"] for record in records] == list(REAL_CONTENDERS[name].names)
    assert all(loss is not None for record in records for loss in record["loss"][0])


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE_TUNED)
@pytest.mark.parametrize("task", tasks_real.FINE_TUNING)
def test_every_fine_tuned_contender_runs(cache, name, task):
    records = run(Job(replace(TINY, task=task, samples=4), name, (0.0003, 0.001), (0, 1)))
    assert [record["contender"] for record in records] == list(FINE_TUNED[name].names)
    assert all(math.isfinite(score) for record in records for scores in record["test"] for score in scores)


def test_pretrained_nets_are_kept_and_copied_into_stacks(cache, monkeypatch):
    network = networks_real.image_residual_net
    state = pretrained.pretrained(network, 0)
    # What is trained is trained once: a second call reads the file.
    with monkeypatch.context() as nothing_is_trained:
        nothing_is_trained.setattr(pretrained, "train", None)
        for name, tensor in pretrained.pretrained(network, 0).items():
            assert torch.equal(tensor, state[name]), name
    stack = pretrained.pretrained_stack(network, (1, 0), 2).double()
    single = pretrained.pretrained_stack(network, (0,), 1).double()
    x = fashion.garments().test.inputs[:3].double()
    outputs = stack.eval()(torch.cat([x] * 4, 1)).unflatten(1, (4, -1))
    torch.testing.assert_close(outputs[:, 3], single.eval()(x))
    # The body is pretrained, the classifier is new.
    fresh = build_stack(network, pretrained.batch_norm, (0,), 1).state_dict()
    new = {name for name, tensor in fresh.items() if torch.equal(tensor.double(), single.state_dict()[name].double())}
    assert new == {"6.weight", "6.bias"}


@pytest.mark.parametrize("name", [OURS, OURS_CENTERED, f"{BATCH_NORM}, frozen"])
def test_a_converted_net_begins_as_the_pretrained_one(cache, name):
    stack = pretrained.pretrained_stack(networks_real.image_residual_net, (0, 1), 1)
    x = torch.cat([fashion.garments().test.inputs[:5]] * 2, 1)
    expected = stack.eval()(x)
    FINE_TUNED[name].convert(stack)
    torch.testing.assert_close(stack.eval()(x), expected, rtol=1e-4, atol=1e-4)
    if "frozen" in name:
        torch.testing.assert_close(stack.train()(x), expected, rtol=1e-4, atol=1e-4)


def test_centred_around_its_mean_a_filter_keeps_it(cache):
    stack = pretrained.pretrained_stack(networks_real.image_residual_net, (0,), 1)
    to_running_centred(stack)
    convolution = stack[0]
    before = convolution.weight.mean((1, 2, 3)).detach()
    with torch.no_grad():
        convolution.parametrizations.weight.original.add_(torch.rand_like(convolution.weight))
    torch.testing.assert_close(convolution.weight.mean((1, 2, 3)), before)


def test_new_domains_are_the_other_classes_and_standardised_as_the_old(tiny_files):
    raw, plain = fashion.raw_garments(), fashion.garments()
    chosen = raw.train.classes >= pretrained.KNOWN
    mean, std = raw.train.inputs.mean(), raw.train.inputs.std()
    images = raw.train.inputs[chosen]
    for name, expected in zip(tasks_real.FINE_TUNING, (images, 1 - images, 4 * images), strict=True):
        data = tasks_real.REAL_TASKS[name].data(SHUFFLED)
        torch.testing.assert_close(data.train.inputs, (expected - mean) / std)
        assert all(part.labels.unique().tolist() == [5, 6, 7, 8, 9] for part in data)
    assert torch.equal(tasks_real.REAL_TASKS["fine-tuning"].data(SHUFFLED).train.inputs, plain.train.inputs[chosen])
