"""`vmamba predict-dense`: what a trained detector or segmentor sees on images, printed and drawn."""

from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from PIL import Image

from vmamba.cli.output import on_terminal
from vmamba.cli.predict import read_images
from vmamba.errors import UserError
from vmamba.mm.mistakes import in_one_line
from vmamba.mm.packages import require
from vmamba.mm.settings import add_config_arguments, load_settings
from vmamba.mm.trained import load_trained
from vmamba.training.distributed import join

_SHOWN_CLASSES = 8


def add_arguments(parser: ArgumentParser) -> None:
    """The configuration, the weights, the images, and where to draw."""
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights of the whole detector or segmentor")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images and folders of images")
    parser.add_argument(
        "--output", default="predictions", metavar="FOLDER", help="where drawn images go (default: predictions)"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, metavar="S", help="objects less sure than this are left out (default: 0.5)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(args: Namespace) -> None:
    """Predict, print and draw, image by image."""
    if not 0 <= args.score <= 1:
        raise UserError(f"--score is {args.score}, expected 0 to 1")
    output = Path(args.output)
    settings = load_settings(args.config, args.cfg_options)
    with in_one_line(), on_terminal(), join(args.device) as process:
        predictor = Predictor(settings, args.checkpoint, process.device)
        drawn = 0
        for name, image in read_images(args.paths):
            file = output / f"{drawn:04d}_{Path(name).stem}.png"
            if file.exists():
                raise UserError(f"{file} exists and is left as it is; name another folder with --output")
            print(f"{name}:  {predictor.draw(image, file, args.score)}", flush=True)
            drawn += 1
    if not drawn:
        raise UserError(f"no images in {', '.join(args.paths)}")
    print(f"drew {drawn} image(s) in {output}")


class Predictor:
    """A trained detector or segmentor that is given one image at a time.

    Args:
        settings: Its configuration.
        checkpoint: Its weights.
        device: What it computes on.

    Raises:
        CheckpointError: The weights cannot be read, or are another model's.
    """

    def __init__(self, settings: Config, checkpoint: str, device: torch.device) -> None:
        scope = settings.default_scope
        require(f"{scope}.utils").register_all_modules()
        init_default_scope(scope)
        self.model = revert_sync_batchnorm(MODELS.build(settings.model))
        load_trained(self.model, checkpoint)
        self.model.to(device).eval()
        self.pipeline = Compose([{"type": f"{scope}.LoadImageFromNDArray"}, *_after_loading(settings)])
        self.visualizer = VISUALIZERS.build(settings.visualizer)
        self.visualizer.dataset_meta = DATASETS.build({**_test_dataset(settings), "lazy_init": True}).metainfo

    def draw(self, image: Image.Image, file: Path, least_score: float) -> str:
        """Write an image with what was found on it, and say that in words."""
        pixels = np.asarray(image)
        data = self.pipeline({"img": np.ascontiguousarray(pixels[..., ::-1]), "img_id": 0})  # BGR, as OpenCV reads
        with torch.inference_mode():
            (found,) = self.model.test_step({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]})
        is_detection = "pred_instances" in found
        options = {"pred_score_thr": least_score} if is_detection else {"with_labels": False}
        file.parent.mkdir(parents=True, exist_ok=True)
        self.visualizer.add_datasample(file.stem, pixels, found.cpu(), draw_gt=False, out_file=str(file), **options)
        return self._objects(found, least_score) if is_detection else self._areas(found)

    def _objects(self, found: Any, least_score: float) -> str:
        objects = found.pred_instances[found.pred_instances.scores >= least_score]
        classes = self.visualizer.dataset_meta["classes"]
        named = [f"{classes[label]} {score:.2f}" for label, score in zip(objects.labels, objects.scores, strict=True)]
        return f"{len(named)} object(s)" + (f": {', '.join(named)}" if named else "")

    def _areas(self, found: Any) -> str:
        labels = found.pred_sem_seg.data.flatten()
        classes = self.visualizer.dataset_meta["classes"]
        largest = Counter(labels.tolist()).most_common(_SHOWN_CLASSES)
        return ", ".join(f"{classes[label]} {100 * count / len(labels):.1f} %" for label, count in largest)


def _test_dataset(settings: Config) -> dict[str, Any]:
    dataset = settings.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def _after_loading(settings: Config) -> list[dict[str, Any]]:
    """The test pipeline without what reads images and annotations from files."""
    names = {one["type"].rpartition(".")[2]: one for one in _test_dataset(settings)["pipeline"]}
    return [transform for name, transform in names.items() if not name.startswith("Load")]
