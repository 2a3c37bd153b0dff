"""segedu: the classic models of semantic segmentation, complete, small and tested, with the book that explains them."""

from segedu import crf, metrics, recipes
from segedu.backbones import ResNet, Xception, dilate, load_imagenet, load_pretrained
from segedu.crf import CRFasRNN, DenseCRF
from segedu.data import CamVid, Cells, Toytown
from segedu.features import record, summary
from segedu.metrics import VOID, Scores
from segedu.models.autodeeplab import AutoDeepLab, SuperNet
from segedu.models.deconvnet import DeconvNet
from segedu.models.deeplab_v1 import DeepLabV1
from segedu.models.deeplab_v2 import DeepLabV2
from segedu.models.deeplab_v3 import DeepLabV3
from segedu.models.deeplab_v3plus import DeepLabV3Plus
from segedu.models.dilation import Dilation
from segedu.models.fcn import FCN
from segedu.models.gcn import GCN
from segedu.models.pspnet import PSPNet
from segedu.models.refinenet import RefineNet
from segedu.models.segnet import SegNet, SegNetBasic
from segedu.models.unet import UNet
from segedu.receptive import effective_field, receptive_field
from segedu.training import evaluate, fit, predict

__all__ = [
    "FCN", "GCN", "VOID", "AutoDeepLab", "CRFasRNN", "CamVid", "Cells", "DeconvNet", "DeepLabV1", "DeepLabV2", "DeepLabV3",
    "DeepLabV3Plus", "DenseCRF", "Dilation", "PSPNet", "RefineNet", "ResNet", "Scores", "SegNet", "SegNetBasic", "SuperNet",
    "Toytown", "UNet", "Xception", "crf", "dilate", "effective_field", "evaluate", "fit", "load_imagenet",
    "load_pretrained", "metrics", "predict", "receptive_field", "recipes", "record", "summary",
]  # fmt: skip
