"""Numbers of each round to TensorBoard, Weights & Biases, MLflow or Trackio."""

from importlib import import_module
from pathlib import Path

from dfl.store.records import flatten


class Trackers:
    """Numbers of each round to TensorBoard, Weights & Biases, MLflow or Trackio, imported only when asked for."""

    def __init__(self, names, folder: Path, config: dict):
        """ValueError for a tracker that will not start (no account, no server)."""
        self.sinks = [_start(name, folder, config) for name in names if name != "none"]

    def log(self, t: int, record: dict) -> None:
        numbers = flatten(record)
        for log, _ in self.sinks:
            log(numbers, t)

    def close(self) -> None:
        for _, close in self.sinks:
            close()


def _start(name: str, folder: Path, config: dict):
    try:
        return _SINKS[name](folder, config)
    except Exception as error:  # each has errors of its own
        raise ValueError(f"report_to = {name!r} does not start: {' '.join(str(error).split())[:200]}") from error


def _tensorboard(folder: Path, config: dict):
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict, t: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, t)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, config: dict):
    run = import_module("wandb").init(project="dfl", name=folder.name, config=config, dir=str(folder))
    return (lambda numbers, t: run.log(numbers, step=t)), run.finish


def _mlflow(folder: Path, config: dict):
    mlflow = import_module("mlflow")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({key: str(value) for key, value in config.items()})
    return (lambda numbers, t: mlflow.log_metrics({k: float(v) for k, v in numbers.items()}, step=t)), mlflow.end_run


def _trackio(folder: Path, config: dict):
    run = import_module("trackio").init(project="dfl", name=folder.name, config=config)
    return (lambda numbers, t: run.log(numbers, step=t)), run.finish


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
