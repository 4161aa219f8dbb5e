"""The architectures: their parameters, inputs, options and initial weights, and that each trains, saves and loads."""

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import in_fresh_process, job_of, save_test_crops
from test_project import ROOT

from cluster.errors import OptionError
from cluster.places import place
from job.config import NAMES, RECIPES, TRANSFER, TrainConfig, configs_of
from job.model.pretrained import weights_option
from job.verify import verify

# At 514 classes: all parameters, and those that are trained by default (of a base, only its last layers).
PARAMETERS = {
    "resnet": (3_105_698, 3_100_322),
    "baseline": (37_934_274, 37_921_314),
    "xception": (96_935_994, 80_791_314),
    "resnet152v2": (134_406_162, 77_098_258),
    "inceptionresnetv2": (125_291_250, 75_225_330),
    "fcn": (11_072_230, 11_067_162),
}


@pytest.fixture
def memory() -> Iterator[None]:
    """Free the memory of full-size models afterwards."""
    import keras

    yield
    keras.utils.clear_session()
    gc.collect()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put small heads on the real bases."""
    monkeypatch.setattr("job.model.architectures.HEAD", (16, 8))


def trainable(model: Any) -> int:
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_that_the_docs_state(name: str) -> None:
    from job.model.architectures import ARCHITECTURES

    assert set(ARCHITECTURES) == set(NAMES) == set(RECIPES)
    model = ARCHITECTURES[name](514)
    assert (model.count_params(), trainable(model)) == PARAMETERS[name]
    (row,) = re.findall(rf"^\| `{name}` \|.*\|$", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert f"| {model.count_params():,} | {4 * trainable(model) / 1e6:.0f} MB" in row


@pytest.mark.usefixtures("memory", "narrow")
@pytest.mark.parametrize(("name", "module"), [
    ("xception", "xception"), ("resnet152v2", "resnet_v2"), ("inceptionresnetv2", "inception_resnet_v2"),
])  # fmt: skip
def test_a_base_gets_the_input_that_it_was_trained_with_and_frozen_norms_keep_their_statistics(
    name: str, module: str
) -> None:
    import keras

    from job.model.architectures import ARCHITECTURES

    model = ARCHITECTURES[name](5, unfreeze="last")
    crops = np.random.default_rng(0).integers(0, 256, (2, 80, 80, 1)).astype(np.float32)
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Concatenate))
    seen = keras.Model(model.input, first.output)(crops)
    wanted = getattr(keras.applications, module).preprocess_input(np.repeat(crops, 3, axis=-1))
    assert np.allclose(seen, wanted, atol=1e-6)

    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    frozen = [norm for norm in norms if not norm.trainable]
    before = [norm.moving_mean.numpy() for norm in norms]
    model(crops, training=True)
    moved = {norm.name for norm, mean in zip(norms, before, strict=True) if not np.array_equal(norm.moving_mean, mean)}
    assert frozen
    assert moved == {norm.name for norm in norms} - {norm.name for norm in frozen}
    everything = ARCHITECTURES[name](5, unfreeze="all")
    assert all(layer.trainable for layer in everything.layers)


# --- options


def test_options_override_the_defaults_of_each_recipe() -> None:
    configs = {config.architecture: config for config in configs_of(["all"], None, None)}
    assert tuple(configs) == NAMES
    assert set(TRANSFER) < set(NAMES)
    assert configs["fcn"] == TrainConfig(architecture="fcn", epochs=40, global_batch_size=200, learning_rate=1e-3)
    assert {name: (c.epochs, c.global_batch_size, c.learning_rate) for name, c in configs.items()} == {
        "resnet": (12, 128, 1e-2),
        "baseline": (10, 512, 1e-4),
        **dict.fromkeys(TRANSFER, (30, 512, 1e-3)),
        "fcn": (40, 200, 1e-3),
    }
    assert {name: (c.schedule, c.augment, c.weight_decay) for name, c in configs.items()} == {
        "resnet": ("cosine", "standard", 0.01),
        **dict.fromkeys(("baseline", *TRANSFER, "fcn"), ("constant", "none", 0)),
    }
    assert {name: (c.weights, c.unfreeze) for name, c in configs.items()} == {
        "resnet": ("none", "all"),
        "baseline": ("none", "all"),
        **dict.fromkeys(TRANSFER, ("imagenet", "last")),
        "fcn": ("none", "all"),
    }
    given = configs_of(["fcn", "xception", "fcn"], "none", None, epochs=3, learning_rate=None, workers=2)
    assert [(c.architecture, c.weights, c.unfreeze, c.epochs, c.workers) for c in given] == [
        ("xception", "none", "all", 3, 2),
        ("fcn", "none", "all", 3, 2),
    ]
    assert configs_of(["xception"], "imagenet", "all")[0].unfreeze == "all"


@pytest.mark.parametrize(("architectures", "weights", "unfreeze", "says"), [
    (["vgg"], None, None, "--architecture must be one of resnet, .*, all. Received: 'vgg'"),
    (["baseline"], "imagenet", None, "--weights must come with one of xception"),
    (["fcn"], None, "all", "--unfreeze must come with one of xception"),
    (["all"], f"sha256:{'0' * 64}", None, "must come with one architecture. Received: xception, resnet152v2"),
    (["xception"], "none.h5", None, "--weights"),
    (["xception"], "none", "last", "--unfreeze last must come with weights"),
])  # fmt: skip
def test_options_that_contradict_one_another_are_refused(
    architectures: list[str], weights: str | None, unfreeze: str | None, says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        configs_of(architectures, weights, unfreeze)


# --- training


@pytest.fixture(scope="module")
def xception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with random weights of an Xception base, in Keras' current format."""
    import keras

    keras.utils.set_random_seed(1)
    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(80, 80, 3))
    path = tmp_path_factory.mktemp("weights") / "made.weights.h5"
    base.save_weights(path)
    return path


# Options of each architecture in these tests. Only `resnet152v2` trains its whole base, because tracing it takes long.
CONFIGS = {
    "xception": {"unfreeze": "last"},
    "resnet152v2": {"unfreeze": "all", "precision": "mixed_bfloat16"},
    "inceptionresnetv2": {"unfreeze": "last", "sampling": "balanced"},
    "fcn": {"precision": "mixed_bfloat16", "sampling": "balanced"},
}
FEWER = ("xception", "fcn")  # enough for `make test`: the transfer architectures differ only in their base


def cut_off(whole: Any, last: str) -> Any:
    """Return a constructor of a base of Keras that ends with the layer `last`."""

    def base(**options: Any) -> Any:
        import keras

        model = whole(**options)
        return keras.Model(model.inputs, model.get_layer(last).output)

    return base


def train_narrow(given: dict[str, Any]) -> None:
    """Train and write one model after the other, in each worker. The models are made smaller: small heads, few filters,
    and only the first blocks of two bases.
    """
    import keras

    from job.model import architectures
    from job.model.start import initial_model
    from job.train.board import StartUp
    from job.train.result import write_result
    from job.train.staging_ahead import staged_partitions
    from job.train.strategy import configure_tensorflow, make_strategy
    from job.train.training import Training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "HEAD", (64, 32))
        patch.setattr(architectures, "FCN_FILTERS", (4, 8, 8))
        inception = cut_off(keras.applications.InceptionResNetV2, "block35_1_ac")
        patch.setattr(keras.applications, "ResNet152V2", cut_off(keras.applications.ResNet50V2, "conv2_block3_out"))
        patch.setattr(keras.applications, "InceptionResNetV2", inception)
        jobs = given["jobs"]
        if jobs[0].config.workers > 1:  # a single worker is the process of the tests, which has used TensorFlow before
            configure_tensorflow(jobs[0].config)
        strategy = make_strategy(jobs[0].config.workers)
        with staged_partitions(jobs[0]) as (partitions, data):
            for job in jobs:
                config = job.config
                keras.config.set_dtype_policy(config.precision)
                keras.utils.set_random_seed(config.seed)
                weights = given["weights"] if config.architecture == "xception" else None
                start = initial_model(config, weights, data.class_names)
                training = Training(job, strategy, partitions, data, StartUp(), *start)
                training.run_epoch()
                write_result(training, training.predict_best())
                keras.utils.clear_session()
        keras.config.set_dtype_policy("float32")


@pytest.fixture(
    scope="module",
    params=[(1, FEWER), pytest.param((2, tuple(CONFIGS)), marks=pytest.mark.long)],
    ids=["fewer-1-worker", "all-2-workers"],
)
def trained(
    request: pytest.FixtureRequest, few: Path, xception_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder of models, each trained for 2 steps: those of `FEWER` in this process (Ray Train's local mode),
    or all by the same two workers.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from job.train.board import Board
    from job.train.rendezvous import Rendezvous

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    (workers, names), models = request.param, tmp_path_factory.mktemp("narrow")
    common = {"learning_rate": 1e-3, "epochs": 1, "global_batch_size": 16, "workers": workers}
    configs = [{"architecture": name} | common | CONFIGS[name] for name in names]
    board = ray.remote(num_cpus=0)(Board).remote()
    jobs = [
        job_of(
            TrainConfig.model_validate(one), dataset=str(few), folder=str(models / one["architecture"] / "narrow"),
            curves=str(models / "tensorboard" / one["architecture"]), run="narrow", board=board,
        )
        for one in configs
    ]  # fmt: skip
    DataParallelTrainer(
        train_narrow,
        backend_config=Rendezvous(),
        train_loop_config={"jobs": jobs, "weights": weights_option(str(xception_weights))},
        scaling_config=ScalingConfig(num_workers=workers if workers > 1 else 0),
        run_config=RunConfig(name="narrow", storage_path=str(models / ".runs")),
    ).fit()
    ray.kill(board)
    return models


LOAD_ALONE = """
import sys
sys.modules.update(dict.fromkeys(["job", "cluster", "preprocessing"]))  # any import of ours fails
import keras, numpy as np
images = np.load(sys.argv[2])
for name in sys.argv[3:]:
    model = keras.saving.load_model(f"{sys.argv[1]}/{name}/narrow/model.keras", safe_mode=True)
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    np.save(f"{name}.npy", model.predict(images, batch_size=16, verbose=0))
    if name == "fcn":
        for height, width in ((80, 640), (33, 41)):
            line = np.random.default_rng(0).integers(0, 255, (2, height, width, 1), dtype=np.uint8)
            assert np.allclose(model.predict(line, verbose=0).sum(axis=1), 1, atol=1e-5)
"""


def test_each_architecture_trains_saves_loads_and_predicts_the_same_without_our_package(
    trained: Path, few: Path, tmp_path: Path
) -> None:
    labels = save_test_crops(few, tmp_path / "images.npy")
    names = [path.name for path in trained.iterdir() if path.name in CONFIGS]
    in_fresh_process(LOAD_ALONE, str(trained), str(tmp_path / "images.npy"), *names, cwd=tmp_path)
    for name in names:
        folder = trained / name / "narrow"
        assert verify(place(folder))[1:] == ([], [])
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history] == [2]
        probabilities = np.load(tmp_path / f"{name}.npy")
        assert probabilities.dtype == np.float32
        of_training = json.loads((folder / "metrics.json").read_text())["test"]
        loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        rounding = 1e-2 if "precision" in CONFIGS[name] else 1e-4
        assert loss == pytest.approx(of_training["loss"], rel=rounding), name


def layers_of(model: Any) -> dict[str, list[np.ndarray]]:
    """Return the weights of each layer that has some, by its name."""
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def test_frozen_layers_keep_the_given_weights_and_the_others_are_trained(trained: Path, xception_weights: Path) -> None:
    import keras

    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(80, 80, 3))
    base.load_weights(xception_weights)
    given = list(layers_of(base).values())
    model = keras.saving.load_model(trained / "xception" / "narrow" / "model.keras", compile=False)
    now = layers_of(model)
    for (name, weights), before in zip(list(now.items())[: len(given)], given, strict=True):
        same = all(np.array_equal(a, b) for a, b in zip(weights, before, strict=True))
        assert same is (not model.get_layer(name).trainable), name
    assert [name for name in now if not model.get_layer(name).trainable] == list(now)[: len(given) - 4]


def test_a_model_computes_in_the_precision_that_it_was_trained_in(trained: Path) -> None:
    import keras

    model = keras.saving.load_model(trained / "fcn" / "narrow" / "model.keras", compile=False)
    policies = {layer.name: layer.dtype_policy.name for layer in model.layers}
    assert {policies[layer.name] for layer in model.layers if isinstance(layer, keras.layers.Conv2D)} == {
        "mixed_bfloat16"
    }
    assert policies[model.layers[-1].name] == "float32"
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
