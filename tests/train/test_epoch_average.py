"""`--average.kind epochs`: the average that IKL's public code makes afterwards, of the checkpoints of all epochs."""

import pytest
import torch
from safetensors.torch import load_file

from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
)
from awp_engine.train.trainer import Trainer

EPOCHS, DECAY = 3, 0.9


def test_it_is_the_average_of_the_checkpoints_of_all_epochs(tmp_path):
    """ema <- 0.9 ema + 0.1 w from the first epoch on, the running statistics too; it is measured and exported."""
    config = Config(
        device="cpu",
        epochs=EPOCHS,
        global_batch_size=50,
        data=DataConfig(train_limit=100),
        model=ModelConfig(width=2),
        attack=AttackConfig(steps=1),
        awp=AwpConfig(gamma=0.0),
        average=AverageConfig(kind="epochs", decay=DECAY, statistics="averaged"),
        evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
        keep_checkpoints=EPOCHS,
        run_dir=tmp_path / "run",
    )
    trainer = Trainer(config)
    report = trainer.run()
    expected, of_epochs = {}, []
    for epoch in range(1, EPOCHS + 1):
        for name, tensor in load_file(
            tmp_path / "run" / "checkpoints" / f"epoch-{epoch}" / "model.safetensors"
        ).items():
            whole = tensor.double() if tensor.is_floating_point() else tensor
            averaged = epoch > 1 and tensor.is_floating_point()
            expected[name] = DECAY * expected[name] + (1 - DECAY) * whole if averaged else whole
        of_epochs.append({name: tensor.clone() for name, tensor in expected.items()})
    found = trainer.average.model.state_dict()
    assert found.keys() == expected.keys()
    exported, selected = load_file(tmp_path / "run" / "model.safetensors"), of_epochs[report["selected_epoch"] - 1]
    for name in found:
        torch.testing.assert_close(found[name].to(expected[name].dtype), expected[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(exported[name].to(selected[name].dtype), selected[name], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found["conv1.weight"], trainer.model.state_dict()["conv1.weight"])


@pytest.mark.parametrize("changes", [{"ramp": False}, {"warmup": 1.0}])
def test_what_only_an_average_of_steps_knows_is_refused(changes):
    with pytest.raises(
        ConfigError, match=rf"--average\.{next(iter(changes))}: expected .* with --average\.kind epochs"
    ):
        AverageConfig(kind="epochs", **changes)
