"""Measures a trained model again: `python engine/evaluate.py RUN_DIR` prints its accuracies on the test split."""

import argparse
from pathlib import Path

from awp_engine.command_line import fail
from awp_engine.config import ConfigError, load_config


def main() -> None:
    """Parse, build, run, close."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a run directory, as engine/train.py leaves it")
    parser.add_argument("--steps", type=int, help="steps of PGD; the run's own number if not given")
    parser.add_argument("--seed", type=int, help="seed of the attack's starting points; the run's own if not given")
    arguments = parser.parse_args()

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.evaluation import evaluate
    from awp_engine.loading import load_model
    from awp_engine.report import print_table
    from awp_engine.trainer import choose_device, evaluation_attack, load_data

    try:
        config = load_config(arguments.run_dir / "config.json")
        attack = evaluation_attack(config, steps=arguments.steps, seed=arguments.seed)
        device = choose_device(config.device)
        model = load_model(arguments.run_dir, device)
        test = load_data(config).test.to(device)
    except (ConfigError, DataError, CheckpointError) as error:
        fail(str(error), prog="evaluate.py")
    accuracy = evaluate(model, test, attack, batch_size=config.evaluation.batch_size)
    print_table(
        [{"clean": f"{accuracy.clean:.2%}", f"PGD-{attack.steps}": f"{accuracy.robust:.2%}"}],
        title=f"{config.data.name} test split, {config.attack.norm} epsilon {config.attack.epsilon}",
    )


if __name__ == "__main__":
    main()
