"""Autoencoders of the patches of images, with small vision models of random weights."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import kronsae
from kronsae import harvest, train
from kronsae.config import DataConfig
from kronsae.data import LanguageModelActivations
from kronsae.data.activations import open_model
from kronsae.data.hookpoints import SITES
from kronsae.data.images import Images, open_documents
from kronsae.data.language_model import LanguageModel
from kronsae.errors import InputError
from kronsae.evaluate import __main__ as evaluate
from kronsae.explore import __main__ as explore

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
BEFORE = {"vit": 1, "clip": 1, "siglip": 0, "dinov2": 5}
"""Positions before the patches: the class token, and the registers of DINOv2."""


def make_model(kind, folder):
    torch.manual_seed(0)
    t = transformers
    of_both = {"text_config": {**SIZES, "vocab_size": 30}, "vision_config": VISION}
    model = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(**of_both, projection_dim=8)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(**of_both)),
        "dinov2": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4, mlp_ratio=2)
        ),
    }[kind]()
    model.save_pretrained(folder)
    square = {"height": 16, "width": 16}
    crops = {"size": {"shortest_edge": 16}, "crop_size": square}
    processor = {
        "vit": lambda: t.ViTImageProcessor(size=square),
        "clip": lambda: t.CLIPImageProcessor(**crops),
        "siglip": lambda: t.SiglipImageProcessor(size=square),
        "dinov2": lambda: t.BitImageProcessor(**crops),
    }[kind]()
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in BEFORE:
        make_model(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Stripes, discs and noise, of many sizes and modes."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    (folder / "more").mkdir()
    for number in range(60):
        height, width = draw.integers(16, 40, 2)
        y, x = np.mgrid[:height, :width]
        kinds = (x // (2 + number % 5) % 2, (x - 12) ** 2 + (y - 12) ** 2 < 60)
        shape = kinds[number % 2][..., None] * draw.integers(50, 255, 3)
        pixels = shape if number % 3 else draw.integers(0, 255, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8)).convert(
            ("RGB", "L", "RGBA", "P", "1")[number % 5]
        )
        image.save(folder / ("more" if number % 2 else "") / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def parquet(images, tmp_path_factory):
    files = sorted(path for path in images.rglob("*.png"))
    rows = {"picture": [str(path) for path in files], "data": [path.read_bytes() for path in files]}
    dataset = datasets.Dataset.from_dict({**rows, "number": list(range(len(files)))})
    path = tmp_path_factory.mktemp("parquet") / "images.parquet"
    dataset.cast_column("picture", datasets.Image()).to_parquet(path)
    return path


def data(models, images, kind="vit", **options):
    place = {} if "hookpoint" in options else {"layer": 1}
    options = {"image_column": "image", "heldout_tokens": 100, **place, **options}
    return DataConfig(model=str(models / kind), dataset=str(images), **options)


FLAGS = (
    *("--image-column", "image", "--heldout-tokens", "100", "--device", "cpu"),
    *("--dict-size", "64", "--m", "2", "--n", "2", "--k", "4"),
    *("--tokens", "700", "--batch-size", "32", "--buffer-tokens", "128", "--checkpoint-every", "3"),
)


def flags(models, images, *more):
    return ["--model", str(models / "vit"), "--dataset", str(images), *FLAGS, *more]


def weights(run):
    return hashlib.sha256((run / "sae" / "sae.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", BEFORE)
def test_activations_are_those_of_transformers_own_call(models, images, kind):
    config = data(models, images, kind)
    model, config = open_model(config, "cpu")
    source = LanguageModelActivations(model, open_documents(config, 0), config, 8, 0)
    contexts, mask, rows = next(source.text_in_order())
    assert mask.sum(1).tolist() == [16] * len(contexts)  # 4 x 4 patches
    assert (~mask[0]).nonzero()[:, 0].tolist() == list(range(BEFORE[kind]))
    files = sorted(images.rglob("*.png"))
    chosen = [Image.open(files[row]).convert("RGB") for row in contexts[:, 0].tolist()]
    pixels = model.images.processor(chosen, return_tensors="pt")["pixel_values"]
    whole = transformers.AutoModel.from_pretrained(models / kind)
    whole = getattr(whole, "vision_model", whole)
    hidden = whole(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(rows, hidden[:, BEFORE[kind] :].flatten(0, 1).detach())


@pytest.mark.parametrize("kind", BEFORE)
def test_blocks_have_all_sites(models, images, kind):
    model = LanguageModel.of(data(models, images, kind), "cpu")
    for site in SITES:
        point = model.at(hookpoint=f"1.{site}")
        assert point.d_model == 16
        assert point.site_at(point.hookpoint) == f"1.{site}"


def test_a_parquet_file_gives_the_same_activations(models, images, parquet):
    def rows(dataset, column):
        model, config = open_model(data(models, dataset, image_column=column), "cpu")
        return model.activations(torch.arange(3)[:, None].expand(-1, 17))

    of_files = rows(images, "image")
    assert torch.equal(rows(parquet, "picture"), of_files)
    assert torch.equal(rows(parquet, "data"), of_files)


def test_a_suite_a_cache_and_evaluation(models, images, tmp_path, capsys):
    given = flags(models, images)
    assert train.main([*given, "--layer", "0", "1", "--out", str(tmp_path / "suite")]) == 0
    assert "reads images, and predicts no next token" in capsys.readouterr().out
    assert train.main([*given, "--layer", "1", "--out", str(tmp_path / "alone")]) == 0
    alone = weights(tmp_path / "alone")
    assert weights(tmp_path / "suite" / "layer1") == alone
    cache = [*given[: given.index("--dict-size")], "--layer", "0", "1"]
    assert harvest.main([*cache, "--out", str(tmp_path / "cache")]) == 0
    read = ["--activations", str(tmp_path / "cache"), "--activations-order", "stream"]
    settings = given[given.index("--device") :]
    out = ["--out", str(tmp_path / "cached")]
    assert train.main([*read, *settings, "--layer", "1", *out]) == 0
    assert weights(tmp_path / "cached") == alone
    assert kronsae.load(tmp_path / "alone").metadata["data"]["image_processor"]
    capsys.readouterr()
    judged = [str(tmp_path / "alone"), "--device", "cpu", "--out", str(tmp_path / "judged")]
    assert evaluate.main(judged) == 0
    out = capsys.readouterr().out
    assert "the positions of an image before its patches pass unchanged" in " ".join(out.split())
    assert explore.main([str(tmp_path / "alone")]) == 2
    assert "kronsae explore reads text" in capsys.readouterr().err


def test_the_plan_counts_patches(models, images, parquet, capsys):
    for dataset, column in ((images, "image"), (parquet, "picture")):
        given = flags(models, dataset, "--layer", "1", "--image-column", column, "--epochs", "2")
        assert train.main([*given, "--plan"]) == 0
        out = capsys.readouterr().out
        assert "about 1,700 tokens to train on" in " ".join(out.split())  # 2 (60 16 - 100)
        assert "counts" not in out
    capsys.readouterr()
    assert train.main(flags(models, parquet, "--layer", "1", "--plan")) == 2
    assert "has no column 'image'" in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit(models, images, tmp_path):
    given = flags(models, images, "--layer", "1", "--checkpoint-every", "1")
    assert train.main([*given, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "kronsae.train", *given, "--out", str(out)])
    while not list(out.glob("checkpoints/step-0000000[4-9]")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "sae" / "sae.safetensors").exists()
    assert train.main(["--resume", str(out)]) == 0
    assert weights(out) == weights(tmp_path / "whole")


def damaged(name, folder, images):
    """A folder of images with one that is wrong, named 0.png."""
    shutil.copytree(images, folder)
    path = folder / "0.png"
    if name == "cut":
        path.write_bytes((images / "00.png").read_bytes()[:90])
    elif name == "deep":
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(path)
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [("cut", "0.png: the image cannot be read"), ("deep", "0.png: expected 8 bits a channel")],
)
def test_an_image_that_is_wrong_is_named(models, images, tmp_path, name, words):
    loaded = Images(data(models, damaged(name, tmp_path / "images", images)))
    with pytest.raises(InputError, match=words):
        loaded.pixels([0])


def test_a_run_does_not_go_on_with_other_images(models, images, tmp_path, capsys):
    """Nobody is told to resume it, which would be refused once the image is corrected."""
    folder = damaged("cut", tmp_path / "images", images)
    given = flags(models, folder, "--layer", "1")
    assert train.main([*given, "--out", str(tmp_path / "run")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "0.png: the image cannot be read" in err and "--resume" not in err
    assert "start again: a run does not go on with other images" in err


def test_small_images_are_read(models, tmp_path):
    for number, size in enumerate(((3, 40), (40, 3), (1, 1))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{number}.png")
    pixels = Images(data(models, tmp_path)).pixels([0, 1, 2])
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_a_model_that_keeps_the_form_of_images_is_refused(models, images, tmp_path):
    shutil.copytree(models / "vit", tmp_path / "vit")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="it has to give all images one size"):
        Images(data(tmp_path, images)).pixels(range(10))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "picture"}, "no column 'picture': it has .'image'."),
        ({"hookpoint": "pooler"}, "expected an output .b, t, d., .2, 17, 'd'. .* got .2, 16."),
        ({"context_length": 64}, "gives 17 positions for an image, got 64"),
        ({"bos": "none"}, "bos has no effect with --image-column"),
        ({"streaming": True}, "streaming has no effect with --image-column"),
        ({"text_column": "words"}, "text_column has no effect with --image-column"),
    ],
)
def test_settings_that_mean_nothing_are_refused(models, images, options, words):
    with pytest.raises(InputError, match=words):
        open_model(data(models, images, **options), "cpu")


def test_pillow_is_asked_for(models, images, monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(InputError, match="--image-column needs the package pillow: pip install"):
        Images(data(models, images))


def test_datasets_without_images_are_refused(models, images, parquet, tmp_path):
    for column, words in (("number", "expected images .* got Value"), ("none", "has no column")):
        with pytest.raises(InputError, match=words):
            Images(data(models, parquet, image_column=column))
    (tmp_path / "text.jsonl").write_text('{"image": "words"}\n')
    with pytest.raises(InputError, match="expected image files, .* got json"):
        Images(data(models, tmp_path / "text.jsonl"))
    with pytest.raises(InputError, match="no file in the folder"):
        Images(data(models, tmp_path))
    with pytest.raises(InputError, match="has no part that reads images as patches"):
        Images(DataConfig(dataset=str(images), image_column="image"))
