"""segedu: the classic models of semantic segmentation, complete, small and tested, with the book that explains them."""

from segedu import crf, metrics, recipes
from segedu.backbones import ResNet, dilate, load_imagenet
from segedu.crf import CRFasRNN, DenseCRF
from segedu.data import CamVid, Cells, Toytown
from segedu.features import record, summary
from segedu.metrics import VOID, Scores
from segedu.models.deconvnet import DeconvNet
from segedu.models.deeplab_v1 import DeepLabV1
from segedu.models.dilation import Dilation
from segedu.models.fcn import FCN
from segedu.models.segnet import SegNet, SegNetBasic
from segedu.models.unet import UNet
from segedu.receptive import effective_field, receptive_field
from segedu.training import evaluate, fit, predict

__all__ = [
    "FCN", "VOID", "CRFasRNN", "CamVid", "Cells", "DeconvNet", "DeepLabV1", "DenseCRF", "Dilation", "ResNet", "Scores",
    "SegNet", "SegNetBasic", "Toytown", "UNet", "crf", "dilate", "effective_field", "evaluate", "fit", "load_imagenet",
    "metrics", "predict", "receptive_field", "recipes", "record", "summary",
]  # fmt: skip
