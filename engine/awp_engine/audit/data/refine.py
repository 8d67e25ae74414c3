"""Iterative training set refinement (ITSR): an adversarial autoencoder that drops suspects while it learns.

Beggel, Pfeiffer, Bischl (2019). Ours, where the paper may be read in more than one way: a suspect stays one, so that
every round looks for further ones among the images that are left; suspects that are not unlearnt at the end keep weight
0; the negative weight is -1; and images of a negative weight take no part in the adversarial game.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from awp_engine.audit.data.autoencoder import Autoencoder

NU = 0.02
ROUNDS = 10
ALPHA = 80.0
NEGATIVE = -1.0


def percentile(values: Tensor, percent: float) -> float:
    """The percentile of values [n], between its two neighbours in proportion, in fp64."""
    return float(torch.quantile(values.double(), percent / 100))


def round_weights(weights: Tensor, codes: Tensor, nu: float = NU) -> Tensor:
    """Weights [n] after one more round: 0 for the outliers of a one-class SVM on the codes of the images that are left.

    Args:
        weights: 1 of an image that is left, 0 of a suspect.
        codes: [n, dimensions].
        nu: of the SVM (Schölkopf et al., 2001), whose kernel is exp(-gamma ||a - b||^2), gamma = 1 / (dimensions * the
            variance of all coordinates): about the share of outliers.
    """
    from sklearn.svm import OneClassSVM

    left = weights > 0
    among = codes[left].double().cpu().numpy()
    outlier = torch.from_numpy(OneClassSVM(kernel="rbf", gamma="scale", nu=nu).fit_predict(among) < 0)
    after = weights.clone()
    after[torch.nonzero(left).squeeze(1)[outlier.to(left.device)]] = 0
    return after


def final_weights(weights: Tensor, errors: Tensor) -> Tensor:
    """Weights [n] of the last training: `NEGATIVE` for suspects whose error is above the suspects' 80th percentile."""
    suspect = weights == 0
    after = weights.clone()
    if suspect.any():
        after[suspect & (errors > percentile(errors[suspect], ALPHA))] = NEGATIVE
    return after


def refine(
    model: Autoencoder,
    x: Tensor,
    *,
    pretrain: int,
    round_epochs: int,
    final: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Trains the model, and drops and unlearns suspects meanwhile.

    Args:
        model: an adversarial autoencoder, not trained yet.
        x: images of one class, fp32 [n, values] in [0, 1].
        pretrain: epochs before the first round.
        round_epochs: of each of the 10 rounds.
        final: after the last one.
        advance: is told 1 after every epoch.

    Returns:
        The images' weights in the last training, [n]: 1, 0 of a suspect, -1 of one that was unlearnt.
    """
    weights = torch.ones(len(x), device=x.device)
    model.train(x, weights, pretrain, advance)
    for _ in range(ROUNDS):
        weights = round_weights(weights, model.score(x).codes)
        model.train(x, weights, round_epochs, advance)
    weights = final_weights(weights, model.score(x).errors)
    model.train(x, weights, final, advance)
    return weights
