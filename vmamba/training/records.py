"""What a run leaves behind, epoch by epoch: summary.csv and the TensorBoard log."""

import csv
import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.files import replace_text

_logger = logging.getLogger(__name__)

SUMMARY_NAME = "summary.csv"

_WITHOUT_EMA = ("ema_loss", "ema_top1", "ema_top5")  # the columns that are empty without one
_REMEDY = "mend it, or move it away to go on without the epochs in it"


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One line of summary.csv. Accuracies are in percent; the fields on EMA are None without one."""

    epoch: int
    lr: float
    train_loss: float
    eval_loss: float
    eval_top1: float
    eval_top5: float
    ema_loss: float | None
    ema_top1: float | None
    ema_top5: float | None
    images_per_second: float
    seconds: float

    @property
    def best_top1(self) -> float:
        return max(self.eval_top1, self.ema_top1 if self.ema_top1 is not None else self.eval_top1)

    @property
    def best_is_ema(self) -> bool:
        return self.ema_top1 is not None and self.ema_top1 >= self.eval_top1


class Records:
    """The records of a run, kept in step with the files in its folder.

    Args:
        folder: Folder of the run.
        first_epoch: Epoch the run starts with. Lines from this epoch on are dropped: they are of epochs that were run
            but not saved, and will be run again.
        tensorboard: Also write a TensorBoard log, if the package is there.
    """

    def __init__(self, folder: Path, first_epoch: int, tensorboard: bool) -> None:
        self.path = folder / SUMMARY_NAME
        self.epochs = [record for record in read_summary(self.path) if record.epoch < first_epoch]
        self._write()
        self._writer = _open_tensorboard(folder, first_epoch) if tensorboard else None

    def add(self, record: EpochRecord) -> None:
        self.epochs.append(record)
        self._write()
        if self._writer is not None:
            for key, value in dataclasses.asdict(record).items():
                if key != "epoch" and value is not None:
                    self._writer.add_scalar(key, value, record.epoch)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(EpochRecord)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(record) for record in self.epochs)
        replace_text(self.path, text.getvalue())


def read_summary(path: Path) -> list[EpochRecord]:
    """The records in a summary.csv; none if there is no such file.

    Raises:
        UserError: The file is damaged or cannot be read.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [_parse(row, f"{path} is damaged at line {rows.line_num}") for row in rows]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; {_REMEDY}") from error


def _parse(row: dict[str, str], where: str) -> EpochRecord:
    try:
        values: dict[str, Any] = {
            key: None if key in _WITHOUT_EMA and not value else float(value) for key, value in row.items()
        }
        return EpochRecord(**{**values, "epoch": int(row["epoch"])})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{where}, expected a number in each of training's columns; {_REMEDY}") from error


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _logger.warning("TensorBoard is not installed: no log for it (pip install tensorboard, or --no-tensorboard)")
        return None
    try:
        return SummaryWriter(folder / "tensorboard", purge_step=first_epoch)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder / 'tensorboard'}: {error.strerror}; or give --no-tensorboard"
        ) from error
