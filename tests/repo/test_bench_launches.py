"""The launches of a training step on a GPU, counted on the CPU: none is added unnoticed."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from awp_kernels import restore_
from awp_kernels._images import operations
from bench.step.launches import count, step_launches

pytestmark = pytest.mark.skipif(operations() is None, reason="needs AVX2 with FMA")

# what docs/performance.md tells; lower them where launches were saved
MOST = {"PreActResNet-18": 2096, "WRN-34-10": 3444}
CONVOLUTIONS = {"PreActResNet-18": 20, "WRN-34-10": 33}
NORMALISATIONS = {"PreActResNet-18": 17, "WRN-34-10": 31}


@pytest.mark.parametrize("name", MOST)
def test_a_step_makes_no_more_launches(name):
    found = step_launches(name, fused=True)
    layers, norms = CONVOLUTIONS[name], NORMALISATIONS[name]
    # ten passes of the attack; ascent and descent have gradients of all weights, and none of the images
    assert found["aten::convolution"] == 12 * layers
    assert found["aten::convolution_backward"] == 10 * layers + 2 * (2 * layers - 1)
    assert found["bn_act_train"] == found["bn_act_backward"] == 3 * 12 * norms
    # a pass's end: mean and logits, the loss's two, and back
    assert found["pooled_linear"] == found["pooled_linear_gradient"] == 12
    assert found["aten::_log_softmax_backward_data"] == 12
    # the loss of guessing has no gradient
    assert found["aten::_log_softmax"] == 13
    assert found["aten::nll_loss_forward"] == 3
    weights = {"total_norm": 2, "perturb": 2, "sgd_step": 4, "pgd_init": 1, "pgd_step": 10}
    assert weights.items() <= found.items()
    assert found.total() <= MOST[name], found.most_common()


def test_torchs_layers_make_other_launches():
    found = step_launches("PreActResNet-18", fused=False, steps=1)
    for operation in ("aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::relu_"):
        assert found[operation] == 3 * NORMALISATIONS["PreActResNet-18"]
    assert not {"bn_act_train", "pooled_linear"} & set(found)


def test_an_operation_whose_launches_nobody_counted_is_named():
    weights, saved = [torch.ones(3)], [torch.zeros(3)]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        restore_(weights, saved)
    with pytest.raises(ValueError, match=r"awp_cpp::restore: expected one of .*; add its launches"):
        count(recorded.events() or ())
