"""The ledger against numbers of the papers and counts by hand; recorded maps against the layers themselves."""

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from segedu.features import record, summary
from segedu.layers import normalize
from segedu.models.deeplab_v3 import DeepLabV3
from segedu.models.fcn import FCN


def test_record_gives_what_the_layers_gave():
    model = FCN(3, pad=1, width=1 / 16).eval()
    images = torch.rand(2, 3, 40, 56)
    with record(model, ["stage1", "stage1.0", "score_fr"]) as maps:
        model(images)
        assert set(maps) == {"stage1", "stage1.0", "score_fr"}
        assert not maps["stage1"].requires_grad
    assert maps["stage1"].shape == (2, 4, 40, 56)
    # The first convolution's output is still as it was: nothing after it works in place.
    torch.testing.assert_close(maps["stage1.0"], model.stage1[0](normalize(images)))
    first = maps["stage1"]
    model(images * 0)
    assert maps["stage1"] is first  # closed: nothing is recorded any more
    assert not any(module._forward_hooks for module in model.modules())


def test_record_follows_each_forward_and_takes_tuples():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, return_indices=True))
    with record(model, ["0", "1"]) as maps:
        model(torch.zeros(1, 1, 4, 4))
        zero = maps["0"]
        model(torch.ones(1, 1, 4, 4))
        assert not torch.equal(maps["0"], zero)
    values, indices = maps["1"]
    assert not values.requires_grad
    assert indices.flatten().tolist() == [0, 2, 8, 10]


def test_record_leaves_no_hooks_after_an_error():
    model = FCN(3, pad=1, width=1 / 16)
    with pytest.raises(RuntimeError, match="stop"), record(model, ["stage1"]):
        raise RuntimeError("stop")
    with pytest.raises(KeyError, match=r"no submodule 'stage1\.9'; there are stage1\.0, "), record(model, ["stage1.9"]):
        pass
    with pytest.raises(KeyError, match="there are stage1, stage2"), record(model, ["stage1", "nowhere"]):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_ledger_of_fcn_at_paper_scale():
    with torch.device("meta"):
        model = FCN(21)
    ledger = summary(model, image_size=(500, 375))
    rows = {row.name: row for row in ledger.rows}
    assert ledger.parameters == 134_362_751  # FCN-8s from its prototxt, frozen upsampling left out
    assert sum(row.parameters for row in ledger.rows) == ledger.parameters
    assert rows["fc6"].parameters == 102_764_544
    assert rows["upscore8"].parameters == 0
    assert list(rows)[:5] == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    assert rows["score_fr"].size == (21, 16, 12)  # ceil((H + 198) / 32) - 6 cells
    assert rows["upscore8"].size == (21, 568, 8 * (2 * (2 * 12 + 2) + 2) + 8)
    assert rows["fc7"].field == (404, 32, 12.5)
    assert rows["fc6"].macs == 4096 * 512 * 7 * 7 * 16 * 12
    assert rows["fc6"].memory == pytest.approx(4096 * 16 * 12 * 4 / 1e6)


def test_ledger_of_vgg16_agrees_with_its_known_cost():
    with torch.device("meta"):
        model = vgg16()
    ledger = summary(model, (224, 224))
    assert ledger.parameters == 138_357_544
    assert ledger.macs / 1e9 == pytest.approx(15.47, abs=0.005)  # torchvision's table of weights: 15.47 GFLOPS (macs)
    assert [(row.name, row.size) for row in ledger.rows] == [
        ("features", (512, 7, 7)),
        ("avgpool", (512, 7, 7)),
        ("classifier", (1000,)),
    ]
    assert ledger.rows[0].field == (212, 32, 15.5)


def test_a_trunk_counts_by_its_last_map():
    with torch.device("meta"):
        row = summary(DeepLabV3(21, output_stride=16), (513, 513)).rows[0]
    assert row.name == "backbone" and row.size == (2048, 33, 33) and row.field.stride == 16


class Net(nn.Module):
    """Boxes out of order, used twice, frozen, in a list and not used."""

    def __init__(self):
        super().__init__()
        self.several = nn.ModuleList([nn.Conv2d(3, 2, 2, 2), nn.BatchNorm2d(2)])
        self.late = nn.Conv2d(2, 1, 1, bias=False)
        self.twice = nn.Conv2d(2, 2, 3, padding=1)
        self.spare = nn.Conv2d(1, 1, 1)
        self.late.weight.requires_grad_(False)

    def forward(self, x):
        for module in self.several:
            x = module(x)
        return self.late(self.twice(self.twice(x)))


def test_ledger_lists_boxes_as_they_run():
    model = Net().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ledger = summary(model, (8, 12))
    assert [row.name for row in ledger.rows] == ["several.0", "several.1", "twice", "late", "spare"]
    assert [row.parameters for row in ledger.rows] == [2 * 3 * 4 + 2, 4, 2 * 2 * 9 + 2, 0, 2]
    assert [row.macs for row in ledger.rows] == [24 * 24, 0, 2 * 36 * 24, 2 * 24, 0]
    assert ledger.macs == sum(row.macs for row in ledger.rows)
    assert [row.field and row.field[:2] for row in ledger.rows] == [(2, 2), (2, 2), (10, 2), (10, 2), None]
    assert ledger.rows[-1].size is None
    assert ledger.memory == pytest.approx(7 * 24 * 4 / 1e6)
    # nothing has run: mode, numbers and running statistics are as they were
    assert model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_ledger_as_text_and_table():
    ledger = summary(FCN(3, pad=1, width=1 / 16), (96, 128))
    title, head, *lines = str(ledger).splitlines()
    assert title == "FCN, one image of 96 x 128"
    assert head.split()[0] == "box" and lines[-1].split()[0] == "total"
    assert len(lines) == len(ledger.rows) + 1
    assert len({len(line) for line in lines}) == 1
    assert f"{ledger.parameters:,}" in lines[-1]
    table = ledger._repr_html_()
    assert "<caption>FCN, one image of 96 x 128</caption>" in table
    assert table.count('<th scope="row">') == len(lines)
    assert table.count('<th scope="col">') == 7
