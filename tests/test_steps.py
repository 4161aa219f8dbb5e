"""What a step of a training computes, and what a checkpoint contains."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import KuzushijiError


def linear_steps(classes: int, batch: int, **options: Any) -> Any:
    """Return the `Steps` of a model with one dense layer, trained by SGD with learning rate 1."""
    import keras
    import tensorflow as tf

    from job.train.step import Steps

    keras.utils.set_random_seed(1)
    crops = keras.Input((80, 80, 1))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255, dtype="float32")(crops))
    model = keras.Model(crops, keras.layers.Dense(classes, activation="softmax")(x))
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(model.trainable_variables)
    return Steps(tf.distribute.get_strategy(), 1, model, optimizer, batch, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("left_out", [[], [1, 3]])
def test_a_step_minimizes_the_smoothed_loss_over_some_classes_and_reports_the_plain_one_over_all(
    left_out: list[int], smoothing: float
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (8, 80, 80, 1), dtype=np.uint8)
    labels = np.array([0, 0, 0, 0, 0, 2, 2, 4])
    steps = linear_steps(5, 8, label_smoothing=smoothing)
    in_loss = np.isin(np.arange(5), left_out, invert=True)
    if left_out:
        steps.classes_in_loss = in_loss.astype(np.float32)
    before = steps.model.predict(images, verbose=0)
    loss = float(steps.train(images, labels, 0)[0])
    assert loss == pytest.approx(-np.log(before[np.arange(8), labels]).sum(), rel=1e-5)
    # The gradient of cross-entropy with respect to the bias before a softmax: the prediction minus the target.
    predicted = in_loss * before / (in_loss * before).sum(axis=1, keepdims=True)
    so = (1 - smoothing) * np.eye(5)[labels] + smoothing * in_loss / in_loss.sum()
    gradient = (predicted - so).sum(axis=0)
    assert steps.model.layers[-1].bias.numpy() == pytest.approx(-gradient / 8, abs=1e-5)


@pytest.mark.parametrize("left_out_by", [20, 200])
def test_a_crop_that_is_far_from_its_class_still_has_a_gradient_if_classes_are_left_out_of_the_loss(
    left_out_by: int,
) -> None:
    images, labels = np.zeros((8, 80, 80, 1), np.uint8), np.zeros(8, np.int64)
    steps = linear_steps(4, 8)
    steps.classes_in_loss = np.array([1, 1, 1, 0], np.float32)
    before = np.array([-25, 0, 0, left_out_by], np.float32)
    steps.model.layers[-1].bias.assign(before)
    steps.train(images, labels, 0)
    change = steps.model.layers[-1].bias.numpy() - before
    # If float32 can't hold the probabilities of the classes in the loss, all classes count.
    expected = [1, -0.5, -0.5, 0] if left_out_by == 20 else [1, 0, 0, -1]
    assert change == pytest.approx(expected, abs=1e-4)


def test_a_training_step_sees_augmented_crops_and_a_prediction_the_crops_as_they_are() -> None:
    import tensorflow as tf

    from job.data.augment import augmented
    from job.data.chance import BatchRows

    images = np.random.default_rng(0).integers(0, 255, (8, 80, 80, 1), dtype=np.uint8)
    labels = np.arange(8) % 3
    steps = linear_steps(3, 10, augment_seed=7)  # rows 2 to 9 of the batch
    copies = augmented(images, BatchRows(tf.constant(0, tf.int64), 2, 10), 7)
    of_copies, of_crops = (-np.log(steps.model.predict(x, verbose=0)[np.arange(8), labels]) for x in (copies, images))
    assert steps.predict(images, labels)[:, 3] == pytest.approx(of_crops, rel=1e-4)
    assert of_copies != pytest.approx(of_crops, rel=1e-1)
    assert float(steps.train(images, labels, 2)[0]) == pytest.approx(of_copies.sum(), rel=1e-4)


def test_the_learning_rate_rises_for_a_twentieth_of_the_steps_and_falls_to_0_and_weights_decay_but_not_biases() -> None:
    import keras

    from job.config import TrainConfig
    from job.train.optimizer import last_learning_rate, make_optimizer

    given = {"architecture": "resnet", "epochs": 1, "global_batch_size": 1, "learning_rate": 0.1}
    config = TrainConfig.model_validate(given | {"schedule": "cosine", "weight_decay": 0.5})
    kernel, bias = keras.Variable(np.ones((2, 2), np.float32)), keras.Variable(np.ones(2, np.float32))
    optimizer = make_optimizer(config, [kernel, bias], steps=40)
    rates, kernels = [], [np.asarray(kernel)[0, 0]]
    for _ in range(40):
        optimizer.apply([np.zeros((2, 2), np.float32), np.zeros(2, np.float32)])
        rates.append(last_learning_rate(optimizer))
        kernels.append(np.asarray(kernel)[0, 0])
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    assert rates[2:] == pytest.approx(0.05 * (1 + np.cos(np.pi * np.arange(38) / 38)), rel=1e-4)
    assert kernels[1:] == pytest.approx(np.cumprod(1 - 0.5 * np.array(rates)), rel=1e-5)
    assert np.asarray(bias).tolist() == [1, 1]
    constant = make_optimizer(TrainConfig.model_validate(given), [keras.Variable(np.ones(2, np.float32))], steps=40)
    constant.apply([np.zeros(2, np.float32)])
    assert last_learning_rate(constant) == pytest.approx(0.1)


@pytest.mark.long
def test_xla_computes_the_same_step() -> None:
    """XLA is for trainings on one GPU; here it runs on the CPU. The dropout masks are the same, too."""
    import keras
    import tensorflow as tf

    from job.model import architectures
    from job.train.optimizer import FusedAdam
    from job.train.step import Steps, training_form

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 80, 80, 1), dtype=np.uint8), rng.integers(1, 10, 16)
    found = []
    for xla in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(architectures, "BASELINE_HEAD", (32, 16))
            keras.utils.set_random_seed(1)
            model = training_form(architectures.baseline(10), 42, dropout=True, synchronized=not xla)
        optimizer = FusedAdam(1e-5)  # small: Adam steps as far where a gradient is only rounding
        optimizer.build(model.trainable_variables)
        steps = Steps(tf.distribute.get_strategy(), 1, model, optimizer, 16, xla=xla)
        steps.classes_in_loss = np.array([0, *[1] * 9], np.float32)
        losses = [float(steps.train(images, labels, 0)[0]) / 16 for _ in range(3)]
        steps.estimate_statistics([images, images[:8]])
        found.append(np.concatenate([losses, steps.predict(images, labels)[:, 1]]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)  # fails if the masks differ


def test_ties_are_broken_by_class_order() -> None:
    import keras

    from job.model.inference import Inference

    crops = keras.Input((80, 80, 1))
    x = keras.layers.GlobalMaxPooling2D()(crops)
    model = keras.Model(crops, keras.layers.Dense(20, activation="softmax", kernel_initializer="zeros")(x))
    labels = np.arange(20)
    images = np.zeros((20, 80, 80, 1), np.uint8)
    predicted = Inference(model).predict(images, labels)
    assert predicted[:, 0].tolist() == [0] * 20
    assert predicted[:, 2].tolist() == [1] * 5 + [0] * 15


def test_a_model_that_gives_nan_is_an_error_in_one_line_and_nan_is_never_among_the_top_5() -> None:
    import keras
    import tensorflow as tf

    from job.model.inference import Inference, predictions_of

    crops = keras.Input((80, 80, 1))
    x = keras.layers.GlobalMaxPooling2D()(crops)
    bias = keras.initializers.Constant(np.nan)
    model = keras.Model(crops, keras.layers.Dense(3, activation="softmax", bias_initializer=bias)(x))
    images, labels = np.zeros((3, 80, 80, 1), np.uint8), np.arange(3)
    assert predictions_of(model, tf.constant(images), tf.constant(labels)).numpy()[:, 2].tolist() == [0, 0, 0]
    line = r"^the model must give finite probabilities\. Received: NaN or infinity for 3 of 3 crops\. "
    for read in (lambda: Inference(model).predict(images, labels), lambda: Inference(model).top(images, 2)):
        with pytest.raises(KuzushijiError, match=line):
            read()


def test_macro_f1_is_the_mean_over_the_classes_that_the_split_has() -> None:
    from job.metrics import metrics

    predictions = np.zeros((4, 4), np.float32)
    predictions[:, 0] = [0, 0, 2, 1]  # class 2 is only predicted: scikit-learn would count its F1 of 0, and give 0.6
    names = ["U+3042", "U+3044", "U+3046", "rare"]
    assert metrics(predictions, np.array([0, 0, 0, 1]), names).macro_f1 == pytest.approx((0.8 + 1) / 2)


def test_a_checkpoint_holds_what_training_changes_once_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from job.model.architectures import ARCHITECTURES
    from job.train.checkpoint import EpochRow, State, changing_variables, read_checkpoint, write_checkpoint
    from job.train.optimizer import FusedAdam

    monkeypatch.setattr("job.model.architectures.HEAD", (16, 8))
    model = ARCHITECTURES["xception"](5, unfreeze="last")
    optimizer = FusedAdam(1e-3)
    optimizer.build(model.trainable_variables)
    changing = changing_variables(model)
    paths = {variable.path for variable in changing}
    assert {variable.path for variable in model.trainable_variables} < paths
    frozen = {variable.path for layer in model.layers if not layer.trainable for variable in layer.variables}
    assert frozen
    assert paths == {variable.path for variable in model.variables} - frozen

    best = [variable.numpy() for variable in changing]
    for epoch in (1, 2):  # the first is the best
        for variable in changing:
            variable.assign(variable.value + 1)
        folder = tmp_path / str(epoch)
        folder.mkdir()
        state = State(epoch=epoch, best_epoch=1, best_accuracy=0.5, history=[EpochRow(1, 5, *[0.5] * 8)])
        write_checkpoint(folder, state, [*changing, *optimizer.variables], best)
        held = sum(entry.file_size for entry in zipfile.ZipFile(folder / "arrays.npz").infolist())
        floats = sum(int(np.prod(variable.shape)) for variable in [*changing, *optimizer.variables])
        floats += sum(weights.size for weights in best) if epoch == 2 else 0
        assert held == pytest.approx(4 * floats, rel=0.01)
        now = [variable.numpy() for variable in changing]
        for variable in changing:
            variable.assign(variable.value * 0)
        again, its_best = read_checkpoint(folder, [*changing, *optimizer.variables])
        assert again == state
        assert all(np.array_equal(a, b) for a, b in zip(changing, now, strict=True))
        assert len(its_best) == (len(best) if epoch == 2 else 0)
        assert all(np.array_equal(a, b) for a, b in zip(its_best, best, strict=False))
