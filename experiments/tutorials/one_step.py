# %% [markdown]
# # Prune, quantize and distill in one step
#
# The student is pruned to 80 % zeros and rounded to 4 bits while it learns from a teacher. All of
# it is one jitted step: the compression is a view inside the loss, the teacher an argument.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import compress_jax as cj

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=0)


class Perceptron(nn.Module):
    """A perceptron with one hidden layer."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Return the logits [batch, 10]."""
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(x)))


def trained(loss, params, optimizer, steps):
    """Minimize a loss of ``(params, step)``."""

    @jax.jit
    def update(params, opt_state, step):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, step), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for step in range(steps):
        params, opt_state = update(params, opt_state, jnp.asarray(step))
    return params


# %% [markdown]
# ## The teacher

# %%
teacher = Perceptron(256)


def teacher_loss(params, step):
    """Return the cross-entropy of the labels."""
    logits = teacher.apply(params, train_x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean()


teacher_params = trained(
    teacher_loss, teacher.init(jax.random.key(0), train_x), optax.adam(3e-3), 150
)
teacher_accuracy = (teacher.apply(teacher_params, test_x).argmax(-1) == test_y).mean()
print(f"teacher: accuracy {teacher_accuracy:.3f}, {cj.nbytes(teacher_params):,} bytes")

# %% [markdown]
# ## The student, compressed while it learns
#
# `view` is what the forward pass sees. `update` follows the sparsity schedule after each step.

# %%
student = Perceptron(64)
params = student.init(jax.random.key(1), train_x)
steps = 300
compression = cj.at(
    "**/kernel",
    cj.chain(
        cj.prune.magnitude(cj.prune.cubic(0.8, begin=0, end=steps // 2)),
        cj.quantize.uniform(bits=4, granularity="channel", scale="mse"),
    ),
)
compression = cj.bind(compression, student.apply, params, train_x)
state = compression.init(params)
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)
teacher_logits = teacher.apply(teacher_params, train_x)  # [batch, 10], the teacher is frozen


@jax.jit
def train_step(params, state, opt_state, step):
    """Prune, quantize and distill."""

    def loss(params):
        logits = student.apply(compression.view(params, state), train_x)
        soft = cj.distill.kl(logits, teacher_logits, temperature=4.0).mean()
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean()
        return 0.9 * soft + 0.1 * hard

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    params = optax.apply_updates(params, updates)
    return params, compression.update(params, state, step=step), opt_state


for step in range(steps):
    params, state, opt_state = train_step(params, state, opt_state, jnp.asarray(step))

# %% [markdown]
# ## What is evaluated is what ships

# %%
packed = compression.pack(params, state)
student_accuracy = (student.apply(cj.unpack(packed), test_x).argmax(-1) == test_y).mean()
print(f"student: accuracy {student_accuracy:.3f}, {cj.nbytes(packed):,} bytes")
print(cj.coverage(compression, params, state))
