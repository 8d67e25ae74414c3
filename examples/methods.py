"""The four methods that the examples show, each in one line; all are used alike."""

from torch import nn

from awp_kernels import AdversarialWeightPerturbation, asam, sam

METHODS = ("awp", "sam", "asam", "bounded")


def perturbation_of(method: str, model: nn.Module) -> AdversarialWeightPerturbation:
    """What moves the weights in a training step.

    Args:
        method: "awp": every weight tensor by gamma of its norm. "sam": all parameters by rho along one direction.
            "asam": the same, measured in multiples of |w| + eta. "bounded": AWP in which no weight moves by more than
            a fraction of itself, in chosen layers, as language models are fine-tuned with.
        model: whose parameters move.

    Raises:
        ValueError: an unknown method.
    """
    match method:
        case "awp":
            return AdversarialWeightPerturbation(model, gamma=0.01)
        case "sam":
            return sam(model, rho=0.05)
        case "asam":
            return asam(model, rho=0.5, eta=0.01)
        case "bounded":
            return AdversarialWeightPerturbation(
                model, gamma=0.1, bound=0.01, select=lambda name, weight: weight.ndim > 1 and "embed" not in name
            )
    raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
