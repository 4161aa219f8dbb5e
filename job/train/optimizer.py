"""Adam for many processes on few cores: one pass over each variable, gradients reduced while others are computed.

Measured with `baseline` on 2 cores, 2 workers with 1 thread each, 128 crops per step, median of 8 steps: Keras' Adam
1.89 s, the fused kernel 1.82 s, the fused kernel with gradients reduced one by one 1.57 s.
With `resnet`, 2 workers, 64 crops per step: 117 crops/s with gradients reduced one by one, 134 in packs of 1 MiB.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job.config import TrainConfig

# Large gradients are reduced one by one, as soon as they are ready; the many small ones of `resnet` share a transfer.
PACK_BYTES = 1 << 20
WARM_UP_PARTS = 20  # the learning rate rises during the first 1/20 of all steps


def make_optimizer(config: TrainConfig, variables: list[Any], steps: int) -> "FusedAdam":
    """Return the built optimizer for a training of `steps` steps. Call it within `strategy.scope()`.

    Weight decay is that of AdamW (arxiv.org/abs/1711.05101). It applies to kernels, not to biases and norms.
    """
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - steps // WARM_UP_PARTS), warmup_target=rate, warmup_steps=steps // WARM_UP_PARTS
        )
    optimizer = FusedAdam(rate, weight_decay=config.weight_decay or None)
    optimizer.exclude_from_weight_decay(var_list=[variable for variable in variables if len(variable.shape) < 2])
    optimizer.build(variables)
    return optimizer


def last_learning_rate(optimizer: keras.Optimizer) -> float:
    """Return the learning rate of the last step."""
    rate = optimizer._learning_rate  # `learning_rate` is the value for the next step
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(optimizer.iterations - 1)
    return float(np.asarray(rate))


class FusedAdam(keras.optimizers.Adam):  # type: ignore[misc]  # Keras has no types
    """`keras.optimizers.Adam` with the same defaults and state, for float32 variables.

    With `weight_decay` it is AdamW: Keras subtracts the decay from the variables before `update_step`.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update with TensorFlow's fused kernel. Keras uses a dozen operations for this formula, each with a copy."""
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[Any]:
        """Reduce gradients in small packs. Keras puts all into one transfer, which waits for the last gradient."""
        gradients, variables = zip(*grads_and_vars, strict=True)
        reduced = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM,
            list(gradients),
            options=tf.distribute.experimental.CommunicationOptions(bytes_per_pack=PACK_BYTES),
        )
        return list(zip(reduced, variables, strict=True))
