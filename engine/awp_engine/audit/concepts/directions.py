"""Linear classifiers of a layer's activations: one by scikit-learn, and hundreds by the same steps, all at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split

ALPHA, MAX_ITER, TOL = 0.01, 1000, 1e-3
_PATIENCE = 5
_MAX_INT = 2**31 - 1
# what rounding may do to a fit, as a part of its largest weight
_ROUNDING = 1e-6

Matrix = NDArray[np.float64]


def split_rows(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit by and rows held out, 67 to 33, as many of every label as there are."""
    parts: Any = train_test_split(np.arange(len(labels)), test_size=0.33, stratify=labels, random_state=seed)
    return parts[0], parts[1]


def epoch_orders(rows: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The order of the samples in every epoch of `SGDClassifier(random_state=seed).fit`.

    scikit-learn shuffles what the last epoch left by the same draws (Fisher and Yates, 32-bit xorshift).
    """
    draws = np.random.RandomState(seed)
    draws.randint(1, _MAX_INT)
    word = int(draws.randint(_MAX_INT)) or 1
    shuffle = np.arange(rows)
    for place in range(rows - 1):
        word ^= word << 13 & 0xFFFFFFFF
        word ^= word >> 17
        word ^= word << 5 & 0xFFFFFFFF
        other = place + (word & _MAX_INT) % (rows - place)
        shuffle[place], shuffle[other] = shuffle[other], shuffle[place]
    order = np.arange(rows)
    for _ in range(MAX_ITER):
        order = order[shuffle]
        yield order


def fit_all(products: Matrix, signs: Matrix, seed: int) -> tuple[Matrix, Matrix]:
    """Linear classifiers of the same samples by different labels: hinge loss, SGD, all at once.

    Every step is that of `sklearn.linear_model.SGDClassifier(alpha=.01, max_iter=1000, tol=1e-3, random_state=seed)`
    (1.8 or later, whose stopping rule counts the penalty). Weights are sums of samples, and a step needs no more than
    the samples' products, so that its cost does not depend on the number of features.

    Args:
        products: of all samples with each other, fp64 [N, N].
        signs: 1 or -1, fp64 [D, N].
        seed: of the order of the samples.

    Returns:
        Of how much of each sample the weights are, [D, N], and the intercepts, [D].
    """
    count, rows = signs.shape
    weights, intercepts = np.zeros((count, rows)), np.zeros(count)
    own = np.arange(count)
    # of those that go on
    w, b, norm, y = np.zeros((count, rows)), np.zeros(count), np.zeros(count), signs
    best, waited = np.full(count, np.inf), np.zeros(count, dtype=int)
    start, scale, step = 1 / (ALPHA * np.sqrt(1 / np.sqrt(ALPHA))), 1.0, 0
    for order in epoch_orders(rows, seed):
        objective = np.zeros(len(own))
        for row in order:
            product = scale * (w @ products[row])
            margin = y[:, row] * (product + b)
            objective += np.maximum(0, 1 - margin) + ALPHA * 0.5 * norm
            eta = 1 / (ALPHA * (start + step))
            update = np.where(margin <= 1, eta * y[:, row], 0.0)
            kept = max(0.0, 1 - eta * ALPHA)
            norm = kept**2 * norm + 2 * update * kept * product + update**2 * products[row, row]
            scale *= kept
            w[:, row] += update / scale
            b += update
            step += 1
        better = objective / rows <= best - TOL
        waited = np.where(better, 0, waited + 1)
        best = np.minimum(best, objective / rows)
        if (ended := waited >= _PATIENCE).any():
            weights[own[ended]], intercepts[own[ended]] = scale * w[ended], b[ended]
            own, waited = own[~ended], waited[~ended]
            w, y = w[~ended], y[~ended]
            b, norm, best = b[~ended], norm[~ended], best[~ended]
            if not len(own):
                break
    weights[own], intercepts[own] = scale * w, b
    return weights, intercepts


@dataclass(frozen=True, kw_only=True)
class Directions:
    """A concept's direction in a layer, and those of the same samples with their labels permuted.

    Attributes:
        samples: the activations that they are sums of, [N, features].
        weights: of how much of each, [1 + nulls, N]; the concept's own first.
        lengths: of the directions, [1 + nulls].
        accuracy: of the concept's classifier on the samples that were held out, 0 to 1.
    """

    samples: Matrix
    weights: Matrix
    lengths: Matrix
    accuracy: float

    def __len__(self) -> int:
        return len(self.weights)

    def unit(self, first: int, last: int) -> Matrix:
        """Directions `first` to `last` - 1 of length 1, [last - first, features]."""
        return self.weights[first:last] / self.lengths[first:last, None] @ self.samples


def find_directions(
    activations: Matrix,
    labels: NDArray[np.int64],
    fit: NDArray[np.int64],
    held_out: NDArray[np.int64],
    *,
    nulls: int,
    seed: int,
) -> Directions:
    """The direction of a concept by scikit-learn, and those of permuted labels.

    Args:
        activations: of all images, fp64 [N, features].
        labels: 1 of the concept's images, 0 of others, [N].
        fit: rows that are fitted, as `split_rows` gives them.
        held_out: the other rows.
        nulls: permutations of the labels of the rows `fit`.
        seed: of the permutations, and of the order of samples, which is the same for all.

    Raises:
        ValueError: the images do not differ in the layer, or it is not finite.
    """
    samples, order = activations[fit], seed % 2**32
    if not np.isfinite(activations).all():
        raise ValueError("its activations are not finite")
    if (samples == samples[0]).all():
        raise ValueError("its activations are the same for all of the concept's images and the others")
    draws = np.random.RandomState(order)
    own = labels[fit]
    all_labels = np.stack([own, *(draws.permutation(own) for _ in range(nulls))]).astype(np.float64)
    known: Any = SGDClassifier(loss="hinge", alpha=ALPHA, max_iter=MAX_ITER, tol=TOL, random_state=order).fit(
        samples, own
    )
    products = samples @ samples.T
    weights, _ = fit_all(products, 2 * all_labels - 1, order)
    # another version of scikit-learn may stop or shuffle by other rules
    if np.abs(weights[0] @ samples - known.coef_[0]).max() > _ROUNDING * np.abs(known.coef_).max():
        raise ValueError(
            "scikit-learn's classifier and those of permuted labels were not fitted by the same steps: "
            "pip install 'scikit-learn>=1.8'"
        )
    lengths = np.sqrt(np.einsum("dn,nm,dm->d", weights, products, weights, optimize=True))
    accuracy = float(known.score(activations[held_out], labels[held_out]))
    return Directions(samples=samples, weights=weights, lengths=lengths, accuracy=accuracy)
