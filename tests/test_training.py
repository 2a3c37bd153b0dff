"""fit, evaluate, predict: learning, exact resume, several processes, and what bad input is told."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import segedu as sg
from segedu.checkpoint import load_checkpoint, read_checkpoint
from segedu.training import pixel_loss

SHORT = sg.recipes.Recipe(steps=6, batch=2, lr=1e-3, optimizer="adamw", power=0.9, flip=True)


class Stripes(torch.utils.data.Dataset):
    """Two classes that brightness tells apart, with a void row between them."""

    def __init__(self, count=8, size=32):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        target = torch.zeros(self.size, self.size, dtype=torch.long)
        target[8 + i % 8 :] = 1
        image = (0.2 + 0.6 * target.float()).expand(3, -1, -1).clone()
        target[8 + i % 8] = 255
        return image, target


def net(classes=2, seed=0):
    torch.manual_seed(seed)
    return sg.FCN(classes, pad=1, width=1 / 16)


def test_it_learns_and_says_so():
    model = net()
    run = sg.fit(model, Stripes(), replace(SHORT, steps=60, batch=4, lr=3e-3), val=Stripes(), progress=False)
    assert len(run.loss) == 60 and run.seconds > 0
    assert run.loss[0] == pytest.approx(np.log(2), abs=1e-3)  # zero scores: ln K
    assert run.scores.miou > 0.9
    assert run.scores.matrix.sum() == 8 * 31 * 32  # void is not scored


def test_the_seed_decides_and_the_callers_generator_is_untouched():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    losses = []
    for seed in (0, 0, 1):
        model = net()
        torch.set_rng_state(before)
        losses.append(sg.fit(model, Stripes(), SHORT, seed=seed, progress=False).loss)
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]


def test_loss_is_the_mean_over_pixels_that_count():
    images, target = torch.rand(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    target[0, :3] = 255
    logits = torch.randn(2, 4, 8, 8)
    by_hand = -logits.log_softmax(1).gather(1, target.clamp(max=3)[:, None])[:, 0]
    expected = by_hand[target != 255].mean()
    torch.testing.assert_close(pixel_loss(lambda _: logits, images, target), expected)
    assert pixel_loss(lambda _: logits, images, torch.full_like(target, 255)) == 0


def test_poly_schedule_and_warm_up_by_hand():
    recipe = sg.recipes.Recipe(steps=100, batch=1, lr=0.1, power=0.9, warmup=10)
    assert recipe.lr_at(0) == pytest.approx(0.01)
    assert recipe.lr_at(50) == pytest.approx(0.1 * 0.5**0.9)
    assert sg.recipes.Recipe(steps=100, batch=1, lr=0.1).lr_at(99) == 0.1
    falling = sg.recipes.DECONVNET_1  # solver.prototxt: base_lr 0.01, gamma 0.1, stepsize 9000
    assert [falling.lr_at(step) for step in (0, 8999, 9000, 18000)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_biases_learn_at_their_own_rate_without_decay():
    model = net()
    nn.init.ones_(model.score_fr.bias)
    nn.init.ones_(model.score_fr.weight)
    for p in model.parameters():
        p.requires_grad_(False)
    model.score_fr.requires_grad_(True)
    recipe = sg.recipes.Recipe(steps=1, batch=1, lr=1e-2, momentum=0.0, weight_decay=1.0, bias_lr=2.0)
    sg.fit(model, Stripes(), recipe, loss=lambda m, x, t: m(x).sum() * 0 + m.score_fr.bias.sum(), progress=False)
    torch.testing.assert_close(model.score_fr.bias, torch.full((2,), 1 - 2e-2))  # gradient 1 at rate 2 lr, no decay
    torch.testing.assert_close(model.score_fr.weight, torch.full_like(model.score_fr.weight, 1 - 1e-2))  # decay alone


def test_score_layers_learn_faster():
    """One SGD step without momentum: weights move by lr, fc8 by 10 lr, its bias by 20 lr (DeepLab v1's solver)."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.conv, net.score = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    recipe = sg.recipes.Recipe(steps=1, batch=1, lr=1e-2, momentum=0.0, bias_lr=2.0, score_lr=10.0)
    data = [(torch.rand(3, 4, 4), torch.randint(0, 2, (4, 4)))]
    gradients = {}

    def loss(model, images, target):
        value = pixel_loss(model, images, target)
        wanted = [p for _, p in model.named_parameters()]
        found = torch.autograd.grad(value, wanted, retain_graph=True)
        gradients.update(zip(before, found, strict=True))
        return value

    sg.fit(net, data, recipe, loss=loss)
    for name, factor in {"conv.weight": 1, "conv.bias": 2, "score.weight": 10, "score.bias": 20}.items():
        moved = before[name] - net.get_parameter(name)
        torch.testing.assert_close(moved, factor * 1e-2 * gradients[name], rtol=1e-3, atol=1e-7)


def test_stopped_and_resumed_is_bit_identical(tmp_path):
    whole = net()
    losses = sg.fit(whole, Stripes(), SHORT, progress=False).loss

    def stop_at(step):
        calls = 0

        def loss(model, images, target):
            nonlocal calls
            calls += 1
            if calls > step:
                raise KeyboardInterrupt
            return pixel_loss(model, images, target)

        return loss

    resumed, path = net(), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        sg.fit(resumed, Stripes(), SHORT, checkpoint=path, checkpoint_every=2, loss=stop_at(5), progress=False)
    other_start = net(seed=9)
    run = sg.fit(other_start, Stripes(), SHORT, checkpoint=path, checkpoint_every=2, progress=False)
    assert run.loss == losses
    for a, b in zip(whole.state_dict().values(), other_start.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False).loss == losses  # done: nothing to do


MINI = """
import sys, torch, segedu as sg
torch.manual_seed(0)
model = sg.FCN(11, pad=1, width=1 / 8)
recipe = sg.recipes.Recipe(steps=40, batch=2, lr=1e-3, optimizer="adamw", flip=True)
sg.fit(model, sg.Toytown("train", size=20), recipe, checkpoint=sys.argv[1], checkpoint_every=5, progress=False)
"""


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_weights(tmp_path):
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    subprocess.run([sys.executable, "-c", MINI, whole], check=True, **options)

    after = int(np.random.default_rng().integers(1, 35))
    process = subprocess.Popen([sys.executable, "-c", MINI, killed], **options)
    while process.poll() is None:  # SIGKILL at the first checkpoint behind step `after`, wherever the loop is then
        if killed.exists() and len(read_checkpoint(killed)[0]["loss"]) >= after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    done = len(read_checkpoint(killed)[0]["loss"])
    assert process.returncode == -signal.SIGKILL and after <= done < 40, (process.returncode, after, done)
    subprocess.run([sys.executable, "-c", MINI, killed], check=True, **options)

    first, second = load_file(whole), load_file(killed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), f"killed behind step {done}"


TWO = """
import sys, torch, segedu as sg
from test_training import Stripes

def processes():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

torch.manual_seed(0)
model = sg.FCN(2, pad=1, width=1 / 16)
model.dropout.p = 0.0
run = sg.fit(model, Stripes(), sg.recipes.Recipe(steps=4, batch=4, lr=1e-2), val=Stripes(), device="cpu", progress=False)
torch.save((run.loss, dict(model.state_dict()), run.scores.matrix, run.scores.boundary, processes()), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    results = []
    for count in (1, 2):
        file = tmp_path / f"{count}.pt"
        several = ["--multi_gpu"] if count > 1 else ["--cpu"]
        command = [*launch, *several, "--num_processes", str(count), str(tmp_path / "two.py"), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(file))
    (loss1, weights1, matrix1, boundary1, count1), (loss2, weights2, matrix2, boundary2, count2) = results
    assert (count1, count2) == (1, 2)
    torch.testing.assert_close(torch.tensor(loss1), torch.tensor(loss2), rtol=1e-4, atol=1e-5)
    for key in weights1:
        torch.testing.assert_close(weights1[key], weights2[key], rtol=1e-4, atol=1e-5)
    assert matrix2.sum() == matrix1.sum() == 8 * 31 * 32
    assert boundary2[1] == boundary1[1] == 8


def test_bf16_trains_in_float32_weights():
    model = net()
    run = sg.fit(model, Stripes(), replace(SHORT, steps=3), mixed_precision="bf16", progress=False)
    assert all(np.isfinite(run.loss)) and model.fc6.weight.dtype == torch.float32
    assert sg.fit(net(), Stripes(), replace(SHORT, steps=1), progress=False).loss  # and back to full precision


# ---- predict


def test_predict_takes_paths_arrays_and_tensors_alike(tmp_path):
    model = net()
    nn.init.normal_(model.score_pool3.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = sg.predict(model, tensor / 255)
    assert expected.shape == (40, 56) and expected.dtype == torch.long and expected.unique().numel() == 2
    for other in (tmp_path / "photo.png", str(tmp_path / "photo.png"), pixels, tensor, Image.fromarray(pixels)):
        assert torch.equal(sg.predict(model, other), expected)
    grey = Image.fromarray(pixels[..., 0])
    assert sg.predict(model, grey).shape == (40, 56)
    assert model.training  # as it was


def test_predict_turns_photos_as_their_exif_tag_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert sg.predict(net(), tmp_path / "phone.jpg").shape == (30, 20)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.png", FileNotFoundError, "no picture at nowhere.png"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"array must be \(H, W, 3\)"),
        (torch.rand(8, 8), ValueError, r"must be \(3, H, W\)"),
        (torch.rand(3, 8, 8) * 255, ValueError, "divide 0-255 values by 255"),
    ],
)
def test_predict_names_wrong_pictures(image, error, message):
    with pytest.raises(error, match=message):
        sg.predict(net(), image)


def test_predict_names_a_broken_file(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(ValueError, match="cannot read a picture"):
        sg.predict(net(), tmp_path / "broken.png")


# ---- bad input: a clear error, nothing lost


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data set is empty"),
        (
            [(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32).long())],
            r"image 0 must be float \(3, H, W\)",
        ),
        ([(torch.rand(3, 32, 32), torch.zeros(32, 32))], r"target 0 must be long"),
        ([(torch.rand(3, 32, 32), torch.zeros(16, 16).long())], "as large as its image"),
        ([(torch.rand(3, 32, 32), torch.full((32, 32), 2))], r"labels of target 0 must be 0 to 1 or 255"),
        ([(torch.rand(3, 32, 32), torch.full((32, 32), -1))], r"labels of target 0 must be 0 to 1"),
        (
            [(torch.rand(3, 32, 32), torch.zeros(32, 32).long()), (torch.rand(3, 40, 40), torch.zeros(40, 40).long())],
            "must be of one size",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        sg.fit(net(), data, SHORT, progress=False)


def test_classes_of_data_and_model_must_agree():
    with pytest.raises(ValueError, match="11 classes, the model 2; build it with 11"):
        sg.evaluate(net(), sg.Toytown("val", size=1))


def test_batch_norm_needs_two_pictures():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match="batch must be at least 2"):
        sg.fit(model, Stripes(), replace(SHORT, batch=1), progress=False)
    assert sg.fit(model, Stripes(), SHORT, progress=False).loss


def test_recipes_say_what_is_wrong():
    with pytest.raises(ValueError, match="steps and batch"):
        sg.recipes.Recipe(steps=0, batch=1, lr=1.0)
    with pytest.raises(ValueError, match='"sgd" or "adamw"'):
        sg.recipes.Recipe(steps=1, batch=1, lr=1.0, optimizer="lion")
    with pytest.raises(TypeError, match="stpes"):
        sg.recipes.Recipe(stpes=1, batch=1, lr=1.0)


def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    calls = 0

    def loss(model, images, target):
        nonlocal calls
        calls += 1
        return pixel_loss(model, images, target) * (float("nan") if calls == 5 else 1)

    with pytest.raises(FloatingPointError, match=r"nan at step 4 of 6.*last good checkpoint is"):
        sg.fit(net(), Stripes(), SHORT, checkpoint=path, checkpoint_every=2, loss=loss, progress=False)
    model = net()
    assert len(load_checkpoint(path, model)["loss"]) == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path):
    path, calls = tmp_path / "run.safetensors", 0

    def loss(model, images, target):
        nonlocal calls
        calls += 1
        value = pixel_loss(model, images, target)
        return value + (value * 0).sqrt() if calls == 4 else value  # a finite loss, a NaN gradient

    with pytest.raises(FloatingPointError, match=r"weights are not finite at step 3 of 6.*last good checkpoint is"):
        sg.fit(net(), Stripes(), SHORT, checkpoint=path, checkpoint_every=2, loss=loss, progress=False)
    model = net()
    assert len(load_checkpoint(path, model)["loss"]) == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    path, calls, old = tmp_path / "run.safetensors", 0, b""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loss(model, images, target):
        nonlocal calls, old
        calls += 1
        if calls == 3:  # behind the first checkpoint: from now on files cannot grow beyond half its size
            old = path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        return pixel_loss(model, images, target)

    try:
        with pytest.raises(OSError, match=r"cannot write the checkpoint of step 4.*last good one.*is kept"):
            sg.fit(net(), Stripes(), SHORT, checkpoint=path, checkpoint_every=2, loss=loss, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert old and path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    assert len(load_checkpoint(path, net())["loss"]) == 2


def test_a_checkpoint_of_another_run_is_not_overwritten(tmp_path):
    path = tmp_path / "run.safetensors"
    sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"belongs to another run.*seed: 0 there, 1 here"):
        sg.fit(net(), Stripes(), SHORT, checkpoint=path, seed=1, progress=False)
    with pytest.raises(ValueError, match="another model's weights"):
        sg.fit(net(classes=3), Stripes(), SHORT, checkpoint=path, progress=False)
    assert path.read_bytes() == before


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """A recipe that was saved before a field was added means that field's default."""
    path = tmp_path / "run.safetensors"
    sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False)
    facts, tensors = read_checkpoint(path)
    del facts["recipe"]["elastic"]
    save_file(tensors, path, metadata={"segedu": json.dumps(facts)})
    assert len(sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False).loss) == SHORT.steps
    with pytest.raises(ValueError, match=r"belongs to another run.*elastic"):
        sg.fit(net(), Stripes(), replace(SHORT, elastic=2.0), checkpoint=path, progress=False)


def test_a_broken_checkpoint_is_named(tmp_path):
    path = tmp_path / "run.safetensors"
    sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a checkpoint of segedu or is broken"):
        sg.fit(net(), Stripes(), SHORT, checkpoint=path, progress=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors", net())
