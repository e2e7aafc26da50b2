"""Image classifiers: every kind of images as calibration, scores against the literal algorithms, all roundings, saving
and reloading, evaluation, and what is said of data that do not fit."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import SMALL_SETTINGS, TINY_VISION, run_command, tiny_model
from PIL import Image
from sensitivity import test_cmpq, test_pmpq, test_taylor, test_tdmpq
from transformers import AutoModelForImageClassification, BertTokenizerFast, ViTImageProcessorPil

from hf_cptquant import CPTQuantConfig, evaluate_model
from hf_cptquant.calibration import facts_of, load_calibration
from hf_cptquant.errors import CalibrationError, EvaluationError, ModelError
from hf_cptquant.model_view import task_of_class, units, view_model
from hf_cptquant.modules import packed_modules
from hf_cptquant.recipe import Recipe
from hf_cptquant.sensitivity import METHODS

CLASSES = ("ant", "bee", "cat", "dog", "emu")
SETTINGS = {"num_samples": 8, "batch_size": 3, "group_size": 32, "quality": "fast"}


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    kinds = ("RGB", "L", "RGBA")
    return [
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).convert(kinds[index % 3])
        for index in range(12)
    ]


@pytest.fixture(scope="session")
def table(pictures) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict({"picture": pictures, "kind": [i % 5 for i in range(12)]}, features=features)


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    return torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "vit"
    tiny_model("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def quantized(folder, **settings):
    config = CPTQuantConfig(**{**SETTINGS, **settings})
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=config)


def calibrated(model, **settings):
    recipe = Recipe(**{"num_samples": 8, "batch_size": 3, "rounding": "nearest", **settings})
    return recipe, load_calibration(recipe, facts_of(model))


# Data


def test_every_form_of_the_same_images_gives_the_same_pixels(vit_folder, pictures, table, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    table.to_parquet(tmp_path / "pictures.parquet")
    processor = ViTImageProcessorPil.from_pretrained(vit_folder)
    expected = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]
    forms = {
        "list": {"dataset": pictures},
        "table": {"dataset": table, "label_column": "kind"},
        "file": {"dataset": tmp_path / "pictures.parquet", "label_column": "kind", "image_column": "picture"},
        "tensor": {"dataset": expected},
        "processor": {"dataset": pictures, "tokenizer": processor},
    }
    for name, form in forms.items():
        _, calibration = calibrated(model, num_samples=12, **form)
        assert [len(batch["pixel_values"]) for batch in calibration.batches] == [3] * 4
        found = torch.cat([batch["pixel_values"] for batch in calibration.batches])
        assert torch.equal(found, expected), name
        assert calibration.description["image_size"] == [32, 32]
        assert ("labels" in calibration.batches[0]) == ("label_column" in form)
    _, some = calibrated(model, num_samples=5, dataset=table, label_column="kind")
    for batch in some.batches:  # labels stay with their images
        for pixel_values, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            index = next(i for i in range(12) if torch.equal(expected[i], pixel_values))
            assert label == index % 5


@pytest.mark.parametrize("name", ["imagenet-1k", "cifar10", "food101"])
def test_hub_datasets_have_images_and_labels(name, vit_folder, table, monkeypatch):
    asked = []

    def load_dataset(*arguments, split, streaming):
        asked.append((arguments[0], split))
        found = table.rename_columns({"picture": "image", "kind": "label"})
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _, calibration = calibrated(AutoModelForImageClassification.from_pretrained(vit_folder), dataset=name)
    assert calibration.description["source"] == name
    assert asked[0][0].endswith(name)
    assert asked[0][1] == "train"
    assert sum(len(batch["labels"]) for batch in calibration.batches) == 8


def bad(**settings):
    return settings


BAD_DATA = {
    "nothing": (bad(), "no calibration data: pass dataset=, one of imagenet-1k.*list of PIL images"),
    "own text": (bad(dataset="self"), "only causal language models write their own text.*PIL"),
    "texts": (bad(dataset=["a text"]), "reads images, and dataset=.*list.*holds none.*PIL images"),
    "Hub texts": (bad(dataset="wikitext2"), "reads images, and dataset= .'wikitext2'. holds none"),
    "table of texts": (
        bad(dataset=datasets.Dataset.from_dict({"text": ["x"]})),
        r"reads images, and none of the columns \['text'\]",
    ),
    "tokens": (bad(dataset=torch.ones(4, 8, dtype=torch.long)), "pixel values must be floats of shape"),
    "no images": (bad(dataset=torch.zeros(0, 3, 32, 32)), "pixel values must be floats"),
    "no accuracy": (
        bad(dataset=torch.rand(4, 3, 32, 32), metric="accuracy", estimator="perturbation"),
        "metric='accuracy' needs labels",
    ),
    "nothing to process": (bad(dataset=[Image.new("RGB", (8, 8))], tokenizer="nowhere"), "no image processor at"),
    "tokenizer": (bad(dataset=[Image.new("RGB", (8, 8))], tokenizer=BertTokenizerFast()), "pass an image processor"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data(case):
    settings, message = BAD_DATA[case]
    with pytest.raises(CalibrationError, match=message):
        calibrated(tiny_model("vit"), **settings)


def test_labels_must_be_those_of_the_model(vit_folder, table):
    model = AutoModelForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    with pytest.raises(CalibrationError, match="is not one of the model's 3 classes"):
        calibrated(model, dataset=table, label_column="kind", num_samples=12)
    with pytest.raises(CalibrationError, match=r"no label column 'x'; its columns are \['picture', 'kind'\]"):
        calibrated(model, dataset=table, label_column="x")
    twice = datasets.Dataset.from_dict(
        {"picture": table["picture"][:], "other": table["picture"][:]},
        features=datasets.Features({"picture": datasets.Image(), "other": datasets.Image()}),
    )
    with pytest.raises(CalibrationError, match=r"set image_column= to one of \['picture', 'other'\]"):
        calibrated(model, dataset=twice)


@pytest.mark.parametrize("form", ["list", "table", "name"])
def test_text_models_refuse_images(form, pictures, table, minilm):
    data = {"list": pictures, "table": table, "name": "cifar10"}[form]
    model = tiny_model("bert-mlm")
    model.config._name_or_path = model.name_or_path = str(minilm)
    with pytest.raises(CalibrationError, match="images, and the model reads text"):
        calibrated(model, dataset=data)


# Structure


def test_structure_and_tasks():
    view = view_model(tiny_model("vit"))
    assert view.blocks == ("vit.layers.0", "vit.layers.1", "vit.layers.2")
    first = [name for name in units(view, "group") if name.startswith("vit.layers.0.")]
    assert [name.removeprefix("vit.layers.0.") for name in first] == [
        "attention.qkv_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
    ]  # fmt: skip
    assert {module.name for module in view.left} >= {"classifier", "vit.embeddings.patch_embeddings.projection"}
    assert task_of_class("DeiTForImageClassification") == "image-classification"
    assert task_of_class("DeiTForImageClassificationWithTeacher") is None  # it computes no loss
    assert task_of_class("PerceiverForImageClassificationFourier") == "image-classification"


# Scores


@pytest.mark.parametrize("kind", TINY_VISION)
def test_taylor_is_that_of_plain_gradients(kind, pixels):
    model = tiny_model(kind)
    recipe, calibration = calibrated(model, dataset=pixels, bits=(3, 4, 8), group_size=32)
    plan = view_model(model).plan("group")
    found = METHODS["tdmpq"](model, plan, calibration, recipe)
    base, first, second, predictions = test_taylor.literal_costs(kind, plan, calibration.batches, recipe)
    expected = test_taylor.combined(first, second, predictions)
    assert found.base == pytest.approx(base, rel=1e-5)
    assert test_taylor.flat(found.costs) == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert max(map(abs, expected.values())) > 1e-3


@pytest.mark.parametrize("kind", TINY_VISION)
def test_pruning_and_noise_are_the_literal_algorithms(kind, pixels):
    model = tiny_model(kind)
    plan = view_model(model).plan("group")
    recipe, calibration = calibrated(model, dataset=pixels, method="pmpq", sparsity_levels=(0.25, 0.6))
    expected = test_pmpq.literal_scores(model, plan, calibration.batches, (0.25, 0.6))
    assert max(map(abs, expected.values())) > 1e-3
    assert METHODS["pmpq"](model, plan, calibration, recipe).raw == pytest.approx(expected, abs=1e-6)
    recipe, calibration = calibrated(model, dataset=pixels, estimator="perturbation")
    expected = test_tdmpq.literal_scores(model, plan, calibration.batches, recipe)
    assert METHODS["tdmpq"](model, plan, calibration, recipe).raw == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_accuracy_is_the_share_of_right_classes(vit_folder, table):
    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    data = {"dataset": table, "label_column": "kind", "num_samples": 12}
    recipe, calibration = calibrated(model, method="pmpq", metric="accuracy", sparsity_levels=(0.6,), **data)
    plan = view_model(model).plan("block")
    found = METHODS["pmpq"](model, plan, calibration, recipe)

    def right() -> float:
        return np.mean(
            [(model(b["pixel_values"]).logits.argmax(-1) == b["labels"]).tolist() for b in calibration.batches]
        )

    base = right()
    assert found.base == pytest.approx(base)
    for block, score in found.raw.items():
        kept = {name: p.clone() for name, p in model.get_submodule(block).named_parameters()}
        weights = [model.get_submodule(module.name).weight for module in plan.modules if module.block == block]
        threshold = torch.quantile(torch.cat([weight.abs().flatten() for weight in weights]), 0.6)
        for weight in weights:
            weight.mul_(weight.abs() > threshold)
        assert score == pytest.approx(base - right())
        model.get_submodule(block).load_state_dict(kept)


@torch.no_grad()
def test_correlations_are_those_of_the_literal_algorithm(pixels):
    model = tiny_model("vit")
    recipe, calibration = calibrated(model, method="cmpq", dataset=pixels, cca_samples=10**6, granularity="group")
    plan = view_model(model).plan("group")
    found = METHODS["cmpq"](model, plan, calibration, recipe)
    members: dict[str, list[str]] = {}
    for module in plan.modules:
        members.setdefault(module.unit, []).append(module.name)
    outputs = {module.name: [] for module in plan.modules}
    for name, kept in outputs.items():
        model.get_submodule(name).register_forward_hook(lambda *seen, kept=kept: kept.append(seen[2].flatten(0, 1)))
    for batch in calibration.batches:
        model(**batch)
    rows = {
        unit: test_cmpq.literal_components(
            torch.cat([torch.cat(outputs[name]) for name in names], 1).double().numpy(), recipe.cca_components
        )
        for unit, names in members.items()
    }
    assert {len(values) for values in rows.values()} == {8 * 17}  # images × (patches and the class token)
    for unit, values in rows.items():
        others = [test_cmpq.literal_correlation(values, other) for name, other in rows.items() if name != unit]
        assert found.raw[unit] == pytest.approx(1 - np.mean(others), abs=2e-3)


def test_positions_in_another_order_are_not_correlated(pixels):
    model = tiny_model("swin")  # attention runs over 4 × 4 windows as if they were images
    recipe, calibration = calibrated(model, method="cmpq", dataset=pixels)
    with pytest.raises(ModelError, match="not one row for each token; use a coarser granularity"):
        METHODS["cmpq"](model, view_model(model).plan("group"), calibration, recipe)


# From model to checkpoint

WAYS = {
    "default": {"iters": 2, "quality": "balanced"},
    "gptq": {"rounding": "gptq"},
    "best of all": {"method": "auto"},
    "the paper's": {"allocation": "kmeans", "method": "pmpq"},
}


@pytest.mark.parametrize("way", WAYS)
def test_quantized_saved_and_reloaded(way, vit_folder, pixels, tmp_path):
    model = quantized(vit_folder, dataset=pixels, **WAYS[way])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert packed_modules(again).keys() == packed_modules(model).keys()
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert model.hf_quantizer.record.plan.packed
    dense = again.dequantize()
    torch.testing.assert_close(dense(pixels).logits, model(pixels).logits, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "AutoModelForImageClassification.from_pretrained" in card
    assert "on 8 images of 32 × 32 pixels (pixel values)" in card


def test_pixels_are_given_in_the_models_dtype(vit_folder, pixels):
    config = CPTQuantConfig(**SETTINGS, dataset=pixels)
    model = AutoModelForImageClassification.from_pretrained(
        vit_folder, dtype=torch.bfloat16, quantization_config=config
    )
    assert model(pixels.bfloat16()).logits.dtype == torch.bfloat16


def test_evaluation_against_the_original(vit_folder, pixels, table):
    model, original = quantized(vit_folder, dataset=pixels), AutoModelForImageClassification.from_pretrained(vit_folder)
    data = CPTQuantConfig(dataset=table, label_column="kind", num_samples=12, tokenizer=str(vit_folder))
    results = {result.metric: result for result in evaluate_model(model, data, against=original)}
    images = torch.cat(
        [batch["pixel_values"] for batch in calibrated(original, num_samples=12, dataset=table)[1].batches]
    )
    labels = torch.tensor(table["kind"][:])
    with torch.no_grad():
        own, other = model(images).logits, original(images).logits
    assert results["accuracy"].value == pytest.approx((own.argmax(-1) == labels).float().mean().item())
    assert results["accuracy"].base == pytest.approx((other.argmax(-1) == labels).float().mean().item())
    expected = (other.softmax(-1) * (other.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean().item()
    assert results["kl_divergence"].value == pytest.approx(expected, abs=1e-5)
    with pytest.raises(EvaluationError, match="has no labels, which accuracy needs"):
        evaluate_model(model, CPTQuantConfig(dataset=pixels))


def test_the_command_line_takes_images_and_keeps_their_processor(vit_folder, table, tmp_path, capsys):
    table.to_parquet(tmp_path / "pictures.parquet")
    data = ("--dataset", tmp_path / "pictures.parquet", "--label-column", "kind", "--num-samples", 8)
    small = ("--quality", "fast", "--group-size", SMALL_SETTINGS["group_size"])
    assert run_command("quantize", vit_folder, *data, *small, "--output", tmp_path / "saved") == 0
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()
    capsys.readouterr()
    assert run_command("evaluate", tmp_path / "saved", *data, "--against", vit_folder) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["metric"] for result in found["results"]] == [
        "accuracy", "loss_increase", "kl_divergence", "top1_agreement",
    ]  # fmt: skip
