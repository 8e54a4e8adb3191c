"""`vmamba test-dense`: the published metrics of a trained detector or segmentor."""

from argparse import ArgumentParser, Namespace

from mmengine.config import Config
from mmengine.runner import Runner

from vmamba.errors import UserError
from vmamba.mm.data_checks import check_data
from vmamba.mm.demonstration import prepare_scenes
from vmamba.mm.mistakes import in_one_line
from vmamba.mm.processes import joined
from vmamba.mm.settings import add_config_arguments, load_settings
from vmamba.mm.trained import load_trained


def add_arguments(parser: ArgumentParser) -> None:
    """The configuration, the weights, and what to do beside measuring."""
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights of the whole detector or segmentor")
    parser.add_argument("--work-dir", metavar="FOLDER", help="where the log and the metrics go (default: runs/CONFIG)")
    parser.add_argument("--tta", action="store_true", help="average over the configuration's tta_pipeline")
    parser.add_argument("--show-dir", metavar="FOLDER", help="also draw predictions beside the truth, below FOLDER")


def run(args: Namespace) -> None:
    """Measure on the test data."""
    settings = load_settings(args.config, args.cfg_options)
    settings.load_from, settings.resume = None, False
    if args.work_dir:
        settings.work_dir = args.work_dir
    if args.tta:
        _use_tta(settings)
    if args.show_dir:
        settings.default_hooks.setdefault("visualization", _drawing_hook(settings)).update(draw=True, interval=1)
        settings.visualizer.save_dir = args.show_dir
    prepare_scenes(settings)
    check_data(settings, "test_dataloader")
    with in_one_line(), joined(settings):
        runner = Runner.from_cfg(settings)
        load_trained(runner.model, args.checkpoint)
        runner.test()


def _use_tta(settings: Config) -> None:
    """Test-time augmentation: the model inside one that merges its answers to several views of an image."""
    missing = [key for key in ("tta_model", "tta_pipeline") if key not in settings]
    if missing:
        raise UserError(f"{settings.filename} has no {' and no '.join(missing)}, which --tta needs")
    settings.model = {**settings.tta_model, "module": settings.model}
    settings.test_dataloader.dataset.pipeline = settings.tta_pipeline


def _drawing_hook(settings: Config) -> dict[str, str]:
    kinds = {"mmdet": "DetVisualizationHook", "mmseg": "SegVisualizationHook"}
    return {"type": kinds[settings.default_scope]}
