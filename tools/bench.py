"""How fast the parts are: `python tools/bench.py`. A function for each entry; each prints its own lines."""

import functools
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each call over `rounds`, the calls taking turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def masks(n: int, num_classes: int, void: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """n label maps and targets of 360 x 480 (int64): regions as in a street scene, a tenth of the labels wrong."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, num_classes, 12, 16, generator=rng)
    target = torch.cat([F.interpolate(maps[None], (360, 480), mode="bilinear").argmax(1) for maps in coarse])
    noise = torch.rand(target.shape, generator=rng)
    labels = torch.where(noise < 0.1, torch.randint(0, num_classes, target.shape, generator=rng), target)
    return labels, torch.where(torch.rand(target.shape, generator=rng) < void, 255, target)


def confusion() -> None:
    """100 masks of 360 x 480 with 11 classes and void, against torchmetrics and scikit-learn."""
    import sklearn.metrics
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    from segedu.metrics import confusion_matrix

    labels, target = masks(100, 11)

    def scikit_learn() -> object:
        seen = (target != 255).numpy()
        return sklearn.metrics.confusion_matrix(target.numpy()[seen], labels.numpy()[seen], labels=range(11))

    ours = "segedu"
    seconds = median_seconds(
        {
            ours: lambda: confusion_matrix(labels, target, 11),
            "torchmetrics": lambda: multiclass_confusion_matrix(labels, target, 11, ignore_index=255),
            "torchmetrics, no checks": lambda: multiclass_confusion_matrix(
                labels, target, 11, ignore_index=255, validate_args=False
            ),
            "scikit-learn": scikit_learn,
        },
        rounds=3,
    )
    print("confusion matrix, 100 masks of 360 x 480, 11 classes")
    for name, value in seconds.items():
        print(f"  {name:<24} {1000 * value:8.1f} ms {value / seconds[ours]:6.1f} x")


def scores() -> None:
    """All scores of one picture, as `evaluate` takes them."""
    from segedu.metrics import Scores

    labels, target = (x[0] for x in masks(1, 11))
    seconds = median_seconds({"Scores.of": lambda: Scores.of(labels, target, 11)}, rounds=20)
    print(f"all scores of one picture of 360 x 480, 11 classes\n  Scores.of {1000 * seconds['Scores.of']:24.1f} ms")


def toytown(n: int = 200) -> None:
    """Scenes drawn per second."""
    from segedu.data import Toytown

    scenes = Toytown("train", size=n)
    start = time.perf_counter()
    for i in range(n):
        scenes[i]
    print(f"Toytown\n  drawing {n / (time.perf_counter() - start):26.0f} scenes/s")


def unet() -> None:
    """Forward and backward, beside SMP's U-Net on VGG16, ours with the width that gives as many parameters.

    They are not the same net. The paper has as many channels at full resolution on the way up as on the way down, SMP's
    decoder a quarter of them, and batch norm. At equal parameters ours does more work, so that is printed too.
    """
    import segmentation_models_pytorch as smp

    from segedu.models.unet import UNet

    nets = {
        "segedu": UNet(11, width=0.875),
        "smp, vgg16": smp.Unet("vgg16", encoder_weights=None, classes=11),
    }
    images, target = torch.rand(1, 3, 256, 256), torch.randint(0, 11, (1, 256, 256))

    def step(net: torch.nn.Module) -> None:
        net.zero_grad()
        F.cross_entropy(net(images), target).backward()

    seconds = median_seconds({name: functools.partial(step, net) for name, net in nets.items()}, rounds=3)
    print("U-Net, forward and backward, one picture of 256 x 256, 11 classes")
    for name, value in seconds.items():
        count = sum(p.numel() for p in nets[name].parameters())
        work = flops(nets[name])
        print(
            f"  {name:<12} {count:12,} parameters {work / 1e9:6.1f} G multiply-adds {value:6.2f} s "
            f"{1e12 * value / work:6.1f} ps each {value / seconds['segedu']:5.2f} x"
        )


def flops(net: torch.nn.Module, side: int = 256) -> int:
    """Multiply-adds of one forward of a square picture, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.rand(1, 3, side, side))
    net.train()
    return counter.get_total_flops() // 2


def unpooling() -> None:
    """Pooling with switches and back, beside torch's own two calls."""
    from segedu.layers import pool_with_switches, unpool

    x = torch.rand(4, 64, 180, 240)

    def ours() -> object:
        pooled, switches = pool_with_switches(x)
        return unpool(pooled, switches, like=x)

    def plain() -> object:
        pooled, switches = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, switches, 2)

    seconds = median_seconds({"segedu": ours, "torch": plain}, rounds=20)
    print("pooling and unpooling, 4 x 64 x 180 x 240")
    for name, value in seconds.items():
        print(f"  {name:<12} {1000 * value:8.1f} ms {value / seconds['segedu']:6.2f} x")


def dilated_resnet() -> None:
    """ResNet-50 without classifier, forward and backward, at output stride 8 beside torchvision's; and at 16 and 32."""
    from torchvision.models import resnet50

    from segedu.backbones import ResNet, dilate

    theirs = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    nets = {f"segedu, stride {stride}": dilate(ResNet(50), stride) for stride in (8, 16, 32)}
    nets["torchvision, stride 8"] = torch.nn.Sequential(*list(theirs.children())[:-2])
    images = torch.rand(1, 3, 225, 225)

    def step(net: torch.nn.Module) -> None:
        net.zero_grad()
        maps = net(images)
        (maps if isinstance(maps, torch.Tensor) else maps[-1]).square().mean().backward()

    for net in nets.values():
        step(net)
    seconds = median_seconds({name: functools.partial(step, net) for name, net in nets.items()}, rounds=5)
    print("ResNet-50, forward and backward, one picture of 225 x 225")
    for name, value in seconds.items():
        print(f"  {name:<24} {value:6.2f} s {value / seconds['torchvision, stride 8']:5.2f} x")


def deeplab_v3() -> None:
    """Forward and backward of v3 beside torchvision's, and of v3+ with as many parameters beside SMP's, ResNet-50.

    torchvision's is the same net: stride 8, head="torchvision". SMP's v3+ has separable convolutions, so ours too: 26.7
    million parameters each. Its decoder has one convolution and its rates are 12, 24, 36; stride 16 both. SMP takes sides
    of 16 m, 19 x 19 cells here, ours pads them to 16 m + 1: 20 x 20 cells, a tenth more work in the deep half.
    """
    import segmentation_models_pytorch as smp
    from torchvision.models.segmentation import deeplabv3_resnet50

    from segedu.models.deeplab_v3 import DeepLabV3
    from segedu.models.deeplab_v3plus import DeepLabV3Plus

    pairs = {
        "DeepLab v3": {
            "segedu": DeepLabV3(21, depth=50, head="torchvision"),
            "torchvision": deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21),
        },
        "DeepLab v3+": {
            "segedu": DeepLabV3Plus(21, backbone="resnet50", separable=True),
            "smp": smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=21),
        },
    }
    images, target = torch.rand(2, 3, 304, 304), torch.randint(0, 21, (2, 304, 304))

    def step(net: torch.nn.Module) -> None:
        net.zero_grad()
        logits = net(images)
        F.cross_entropy(logits["out"] if isinstance(logits, dict) else logits, target).backward()

    for title, nets in pairs.items():
        calls = {name: functools.partial(step, net) for name, net in nets.items()}
        for call in calls.values():
            call()
        seconds = median_seconds(calls, rounds=5)
        print(f"{title}, ResNet-50, forward and backward, two pictures of 304 x 304")
        for name, value in seconds.items():
            count, work = sum(p.numel() for p in nets[name].parameters()), flops(nets[name], 304)
            print(
                f"  {name:<12} {count:12,} parameters {work / 1e9:6.1f} G multiply-adds {value:6.2f} s "
                f"{1e12 * value / work / 2:6.1f} ps each {value / seconds['segedu']:5.2f} x"
            )


def pspnet() -> None:
    """Forward and backward of PSPNet, ResNet-50 at stride 8, beside SMP's.

    SMP's default net ends after layer2, so it gets the whole trunk, dilated to stride 8 (its own `make_dilated`, which is
    PSPNet's rule), and ours its 7x7 stem. SMP's head differs in two layers: they are exchanged for the paper's, 3x3 after
    the pyramid and 1x1 to the classes. Both take pictures of 8 m + 1 pixels, so all maps are of one size; SMP's check for
    sides of 8 m is off, and its scores, 304 pixels wide, are cut to 297. What is left to differ: SMP's bin of 1 has a bias
    in place of batch norm.
    """
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.base.modules import Conv2dReLU

    from segedu.models.pspnet import PSPNet

    theirs = smp.PSPNet("resnet50", encoder_weights=None, encoder_depth=5, psp_dropout=0.1, classes=21)
    theirs.encoder.make_dilated(8)
    theirs.requires_divisible_input_shape = False
    theirs.decoder.conv = Conv2dReLU(4096, 512, 3, padding=1, use_norm="batchnorm")
    theirs.segmentation_head[0] = torch.nn.Conv2d(512, 21, 1)
    nets = {"segedu": PSPNet(21, depth=50, stem="7x7"), "smp": theirs}
    images, target = torch.rand(2, 3, 297, 297), torch.randint(0, 21, (2, 297, 297))

    def step(net: torch.nn.Module) -> None:
        net.zero_grad()
        F.cross_entropy(net(images)[..., :297, :297], target).backward()

    calls = {name: functools.partial(step, net) for name, net in nets.items()}
    for call in calls.values():
        call()
    seconds = median_seconds(calls, rounds=7)
    print("PSPNet, ResNet-50, stride 8, forward and backward, two pictures of 297 x 297")
    for name, value in seconds.items():
        count, work = sum(p.numel() for p in nets[name].parameters()), flops(nets[name], 297)
        print(
            f"  {name:<12} {count:12,} parameters {work / 1e9:6.1f} G multiply-adds {value:6.2f} s "
            f"{value / seconds['segedu']:5.2f} x"
        )


def crf(rounds: int = 3) -> None:
    """Dense CRF, 10 steps with set-up, 21 classes, photos of 500 x 500, beside pydensecrf; and its gradient, 5 steps."""
    import skimage.data
    import skimage.transform

    from segedu.crf import PARAMETERS, DenseCRF

    if importlib.util.find_spec("pydensecrf") is None:
        print("dense CRF: not run, pydensecrf2 is not installed")
        return
    rng = torch.Generator().manual_seed(0)
    photos, threads, ratios = {}, torch.get_num_threads(), []
    for name in ("astronaut", "chelsea", "coffee"):
        image = skimage.transform.resize(getattr(skimage.data, name)(), (500, 500), preserve_range=True).round()
        coarse = 2 * torch.randn(1, 21, 16, 16, generator=rng)
        logits = F.interpolate(coarse, (500, 500), mode="bilinear")[0] + 0.3 * torch.randn(21, 500, 500, generator=rng)
        photos[name] = torch.from_numpy(image.astype("uint8")).permute(2, 0, 1), logits
    for backend in ("lattice", "pydensecrf"):  # the first call of a process is slower
        DenseCRF(backend=backend)(*photos["astronaut"])
    print(f"dense CRF, 500 x 500, 21 classes, 10 steps with set-up, {threads} threads")
    for settings, (name, pair) in itertools.product(PARAMETERS, photos.items()):
        ours, theirs = (DenseCRF(**PARAMETERS[settings], backend=b) for b in ("lattice", "pydensecrf"))
        calls = {"segedu": functools.partial(ours, *pair), "pydensecrf": functools.partial(theirs, *pair)}
        seconds = median_seconds(calls, rounds)
        ratios.append(seconds["pydensecrf"] / seconds["segedu"])
        print(
            f"  {name:<10} {settings:<16} pydensecrf {1000 * seconds['pydensecrf']:6.0f} ms, segedu "
            f"{1000 * seconds['segedu']:6.0f} ms {ratios[-1]:6.2f} x as fast"
        )
    print(f"  median {statistics.median(ratios):.2f} x, least {min(ratios):.2f} x")

    image, logits = photos["astronaut"]
    for settings in ("pydensecrf", "deeplab-v2", "crf-rnn"):
        crf = DenseCRF(**PARAMETERS[settings])

        def both(crf: Callable = crf) -> None:
            crf(image, logits.clone().requires_grad_(), steps=5)[0].sum().backward()

        both()
        seconds = median_seconds({"forward": lambda crf=crf: crf(image, logits, steps=5), "both": both}, 2 * rounds)
        print(f"  {settings:<16} forward and backward {seconds['both'] / seconds['forward']:.2f} x forward, 5 steps")


def crf_memory() -> None:
    """Most memory of a dense CRF over what its process had before, each in a process of its own."""
    code = """
import resource, sys, torch
from segedu.crf import PARAMETERS, DenseCRF
import skimage.data
backend, settings = sys.argv[1:]
image, logits = skimage.data.astronaut()[:500, :500], torch.rand(21, 500, 500)
crf = DenseCRF(**PARAMETERS[settings], backend=backend)
crf(image[:32, :32], logits[:, :32, :32])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
crf(image, logits, steps=3)
print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:6.0f} MiB")
"""
    print("dense CRF, 500 x 500, 21 classes, memory")
    for settings, backend in itertools.product(("pydensecrf", "deeplab-v2"), ("lattice", "pydensecrf")):
        done = subprocess.run([sys.executable, "-c", code, backend, settings], capture_output=True, text=True)
        print(f"  {settings:<16} {backend:<10} {done.stdout.strip() or done.stderr.splitlines()[-1]}")


def saved_for_backward(model: torch.nn.Module, side: int, pictures: int = 2) -> int:
    """Bytes a picture that a training step keeps for its backward pass, without the weights; model on the meta device.

    Exact and at once: nothing is computed. `pictures`: two, as batch norm of a 1x1 map needs.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model(torch.empty(pictures, 3, side, side))
        _loss = F.cross_entropy(logits, torch.empty(pictures, side, side, dtype=torch.long))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own) // pictures


def refinenet_memory(side: int = 512) -> None:
    """RefineNet, scores at stride 4, beside DeepLab v2 and v3 at output stride 8: ResNet-101, one picture of side x side.

    Training: what is saved for the backward pass, and weights with gradient and momentum, by arithmetic. Test: the most
    memory of a forward pass over what its process had with the model in it, each in a process of its own.
    """
    import segedu as sg

    nets = {"RefineNet": ("RefineNet", 4), "DeepLab v2": ("DeepLabV2", 8), "DeepLab v3": ("DeepLabV3", 8),
            "v3, stride 16": ("DeepLabV3", 16)}  # fmt: skip
    code = """
import resource, sys, torch, segedu as sg
name, stride, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = getattr(sg, name)(21, **({"output_stride": stride} if name == "DeepLabV3" else {})).eval()
with torch.no_grad():
    model(torch.rand(1, 3, 33, 33))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(torch.rand(1, 3, side, side))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    print(f"memory of ResNet-101 with 21 classes, a picture of {side} x {side}, MiB: saved for backward, weights with")
    print("gradient and momentum, peak of a forward pass")
    for name, (net, stride) in nets.items():
        with torch.device("meta"):
            model = getattr(sg, net)(21, **({"output_stride": stride} if net == "DeepLabV3" else {}))
        weights = 3 * sum(4 * p.numel() for p in model.parameters())
        done = subprocess.run([sys.executable, "-c", code, net, str(stride), str(side)], capture_output=True, text=True)
        peak = f"{int(done.stdout) / 2**20:6.0f}" if done.returncode == 0 else done.stderr.splitlines()[-1]
        print(f"  {name:<14} {saved_for_backward(model, side) / 2**20:6.0f} {weights / 2**20:6.0f} {peak}")


def autodeeplab_memory() -> None:
    """What a training step keeps for its gradients: the relaxed network, at the paper's search size, and the one decoded."""
    from segedu.models.autodeeplab import AutoDeepLab, SuperNet

    images = torch.rand(2, 3, 161, 161)
    print("Auto-DeepLab, F = 8, kept by a training step of 2 pictures of 161 x 161")
    for name, net in (("relaxed", SuperNet(19)), ("decoded", AutoDeepLab(19, filters=8))):
        own, kept = {p.data_ptr() for p in net.parameters()}, {}

        def keep(t: torch.Tensor, own: set = own, kept: dict = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() * (t.data_ptr() not in own)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = net(images).square().mean()
        count = sum(p.numel() for p in net.parameters())
        print(f"  {name:<10} {count:12,} parameters {sum(kept.values()) / 2**20:8.0f} MiB")
        del loss


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    confusion()
    unet()
    unpooling()
    dilated_resnet()
    deeplab_v3()
    pspnet()
    crf()
    crf_memory()
    refinenet_memory()
    autodeeplab_memory()
    torch.set_num_threads(1)
    print("1 thread")
    crf()
    scores()
    toytown()
