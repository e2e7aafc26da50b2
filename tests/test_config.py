"""CPTQuantConfig and Recipe: what is refused and how it is told, defaults, JSON both ways."""

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch

from hf_cptquant import CPTQuantConfig
from hf_cptquant.config import CPTQuantCheckpointConfig
from hf_cptquant.errors import ConfigError, CPTQuantError
from hf_cptquant.recipe import QUALITIES, Recipe

MANY = {
    "method": "tdmpq",
    "bits": [3, 6, 16],
    "allocation": "integer",
    "granularity": "block",
    "target_bits": 5.5,
    "target_size": None,
    "target_compression": None,
    "max_loss_increase": None,
    "bits_override": {"*.fc2": 4},
    "quantize_lm_head": 8,
    "quantize_embeddings": 4,
    "quantize_vision_tower": 6,
    "quantize_front_end": 5,
    "refine": 5,
    "regularization": 0.25,
    "plan": None,
    "group_size": 64,
    "symmetric": False,
    "quality": "best",
    "rounding": "nearest",
    "iters": 7,
    "recover": "scales",
    "metric": "accuracy",
    "estimator": "perturbation",
    "taylor_samples": 256,
    "perturb": "first",
    "perturbation_scale": 0.05,
    "sparsity_levels": [0.2, 0.4],
    "cca_components": 8,
    "cca_samples": 512,
    "dataset": ["first text", "second text"],
    "tokenizer": "some/model",
    "text_column": "body",
    "image_column": "picture",
    "label_column": "stars",
    "num_samples": 16,
    "sequence_length": 64,
    "batch_size": 2,
    "modules_to_not_convert": ["lm_head", r".*\.fc2"],
    "allow_skipped": True,
    "target_runtime": "vllm-cpu",
    "strict": True,
    "work_dir": "work",
    "seed": 7,
}


class Tokenizer:
    """Any object that is not a name."""


def test_many_settings_cover_all():
    assert MANY.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert MANY.keys() == inspect.signature(CPTQuantConfig).parameters.keys() - {"unknown"}


def test_defaults_are_filled_in_by_the_recipe():
    config = CPTQuantConfig()
    assert (config.allocation, config.granularity) == (None, None)
    recipe = config.recipe()
    assert (recipe.method, recipe.estimator, recipe.allocation, recipe.granularity) == (
        "tdmpq",
        "taylor",
        "integer",
        "group",
    )
    assert (recipe.bits, recipe.target_bits) == ((4, 8, 16), None)
    assert (recipe.group_size, recipe.symmetric, recipe.rounding, recipe.iters) == (128, True, "signround", 100)
    assert (recipe.perturb, recipe.num_samples, recipe.sequence_length, recipe.seed) == ("all", 128, 2048, 0)
    assert recipe == Recipe()


def test_clusters_take_no_budget_and_decide_on_blocks():
    recipe = CPTQuantConfig(allocation="kmeans").recipe()
    assert (recipe.target_bits, recipe.granularity, recipe.estimator) == (None, "block", "perturbation")
    assert recipe == Recipe(allocation="kmeans", granularity="block", estimator="perturbation")


@pytest.mark.parametrize(("quality", "expected"), QUALITIES.items())
def test_quality_names_a_rounding_which_may_be_given_instead(quality, expected):
    recipe = CPTQuantConfig(quality=quality).recipe()
    assert (recipe.rounding, recipe.iters) == expected
    recipe = CPTQuantConfig(quality=quality, rounding="signround", iters=3).recipe()
    assert (recipe.rounding, recipe.iters) == ("signround", 3)
    again = CPTQuantConfig.from_dict(CPTQuantConfig(quality=quality).to_dict())
    assert (again.quality, again.rounding, again.recipe().rounding) == (quality, None, expected[0])


@pytest.mark.parametrize("method", ["cmpq", "pmpq", "tdmpq"])
def test_the_pipeline_of_the_paper_is_one_call(method):
    recipe = CPTQuantConfig.paper(method, dataset=["text"]).recipe()
    assert (recipe.method, recipe.allocation, recipe.granularity, recipe.bits) == (
        method,
        "kmeans",
        "block",
        (4, 8, 16),
    )
    assert (recipe.rounding, recipe.symmetric, recipe.estimator, recipe.perturb) == (
        "nearest",
        False,
        "perturbation",
        "first",
    )
    assert recipe.dataset == ["text"]


def test_recipe_has_the_settings_given():
    recipe = CPTQuantConfig(**MANY).recipe()
    lists = {"bits": (3, 6, 16), "sparsity_levels": (0.2, 0.4), "modules_to_not_convert": ("lm_head", r".*\.fc2")}
    assert dataclasses.asdict(recipe) == {**MANY, **lists, "bits_override": (("*.fc2", 4),)}


def test_recipe_is_frozen():
    recipe = CPTQuantConfig().recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1


def test_recipe_does_not_follow_later_changes():
    bits = [4, 8]
    config = CPTQuantConfig(bits=bits)
    recipe = config.recipe()
    bits.append(16)
    config.seed = 5
    assert (recipe.bits, recipe.seed) == ((4, 8), 0)


def test_settings_changed_later_are_checked_too():
    config = CPTQuantConfig()
    config.group_size = 100
    with pytest.raises(ConfigError, match="group_size=100"):
        config.recipe()
    with pytest.raises(ConfigError, match="group_size=100"):
        config.to_dict()


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("group_sise", "group_size"),
        ("groupsize", "group_size"),
        ("bit", "bits"),
        ("num_sample", "num_samples"),
        ("seq_length", "sequence_length"),
        ("modules_to_not_converts", "modules_to_not_convert"),
        ("allow_skip", "allow_skipped"),
    ],
)
def test_unknown_setting_names_the_nearest(unknown, nearest):
    with pytest.raises(ConfigError, match=f"no setting '{unknown}'; did you mean '{nearest}'"):
        CPTQuantConfig(**{unknown: 1})


def test_unknown_setting_like_no_other_is_named_alone():
    with pytest.raises(ConfigError, match=r"no setting 'xyzzy'$"):
        CPTQuantConfig(xyzzy=1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("method", value) for value in ("tdmq", None, 3)),
        *(("allocation", value) for value in ("k-means", 3, "", False)),
        *(("granularity", value) for value in ("layer", 3, "", False)),
        *(("quality", value) for value in ("good", None, 2)),
        *(("rounding", value) for value in ("up", 2, True)),
        *(("iters", value) for value in (-1, 2.5, "20", True)),
        *(("perturb", value) for value in ("last", None)),
        *(("group_size", value) for value in (0, 100, -2, 128.0, "128", None, True)),
        *(("symmetric", value) for value in (None, 1, 0, "yes")),
        *(("allow_skipped", value) for value in (None, 1, "yes")),
        *(("strict", value) for value in (None, 1, "yes")),
        *(("target_runtime", value) for value in ("vLLM", "vllm-gpu", True, 8, ["vllm"])),
        *(
            ("bits", value)
            for value in (4, 4.5, "4", None, (), [], (7,), (1,), (4, 4), (4, "8"), (4.0,), (True,), [[4]])
        ),
        *(("num_samples", value) for value in (0, -1, 1.5, "8", None, True)),
        *(("sequence_length", value) for value in (7, 0, 64.0, "64", None)),
        *(("batch_size", value) for value in (0, -1, 1.5, "8", True)),
        *(("seed", value) for value in (-1, 0.5, "0", None, False)),
        *(("metric", value) for value in ("los", None, 1)),
        *(("estimator", value) for value in ("tailor", 1, True)),
        *(("taylor_samples", value) for value in (0, -1, 1.5, None, True)),
        *(("cca_components", value) for value in (0, -1, 1.5, None, True)),
        *(("cca_samples", value) for value in (1, 0, 1.5, None, True)),
        *(("work_dir", value) for value in (3, ["a"], True)),
        *(("target_bits", value) for value in (0, -1, "4", float("nan"), float("inf"), True)),
        *(("target_size", value) for value in (0, -1, "big", "MB", "", [3], True)),
        *(("target_compression", value) for value in (0, -2.0, "2x", True)),
        *(("max_loss_increase", value) for value in (-0.1, "0.1", float("nan"), True)),
        *(("regularization", value) for value in (-1, "1", None, float("inf"), True)),
        *(("bits_override", value) for value in ("*.fc2=8", [("*.fc2", 8)], {3: 8}, 5)),
        *(("perturbation_scale", value) for value in (0, -0.1, float("inf"), float("nan"), "0.1", None, True)),
        *(("sparsity_levels", value) for value in (0.5, "0.5", None, (), (0.0,), (1.0,), (0.5, "x"), (1,))),
        *(("text_column", value) for value in (3, ["text"])),
        *(("label_column", value) for value in (3, ["label"])),
        *(("modules_to_not_convert", value) for value in ("lm_head", "", 3, 4.5, True, ["a", 3], [None])),
        *(("dataset", value) for value in ("unknown", "", "data.csv", 3, 0.5, True, b"text", {"text": ["a"]})),
        *(("tokenizer", value) for value in (3, True)),
    ],
    ids=repr,
)
def test_wrong_type_or_range_names_the_setting(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}="):
        CPTQuantConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["method", "allocation", "granularity", "rounding", "perturb", "group_size"])
def test_wrong_choice_lists_the_right_ones(setting):
    choices = {"method": "tdmpq", "allocation": "kmeans", "granularity": "module", "rounding": "nearest"}
    choice = choices.get(setting, {"perturb": "first", "group_size": "256"}.get(setting))
    with pytest.raises(ConfigError, match=f"{setting}='nonsense' is not one of .*{choice}"):
        CPTQuantConfig(**{setting: "nonsense"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("bits", value) for value in ([4], (2,), [2, 3, 4, 5, 6, 8, 16], [16, 4])),
        *(("group_size", value) for value in (-1, 16, 32, 64, 128, 256)),
        *(("granularity", value) for value in ("block", "group", "module")),
        *(
            ("dataset", value)
            for value in (None, "wikitext2", "c4", "imdb", "a/b.txt", "b.jsonl", "c.json", "d.parquet")
        ),
        ("perturbation_scale", 1),
        ("metric", "accuracy"),
        ("estimator", "taylor"),
        ("target_bits", 4.5),
        ("target_size", 10**9),
        ("target_compression", 3),
        ("batch_size", None),
        ("sequence_length", 8),
        ("modules_to_not_convert", ()),
    ],
    ids=repr,
)
def test_documented_values_are_accepted(setting, value):
    recipe = CPTQuantConfig(**{setting: value}).recipe()
    assert getattr(recipe, setting) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("wikitext", "wikitext2"), ("wikitext-2", "wikitext2"), ("imbd", "imdb"), ("C4", "c4")]
)
def test_unknown_dataset_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"dataset='{name}' .*did you mean '{nearest}'"):
        CPTQuantConfig(dataset=name)


def test_unknown_dataset_like_no_other_lists_what_there_is():
    named = "wikitext2, c4, imdb, imagenet-1k, cifar10, food101, self"
    with pytest.raises(ConfigError, match=rf"{named} nor a file ending in \.txt, \.jsonl, \.json, \.parquet$"):
        CPTQuantConfig(dataset="qqqqqqqq")


def test_bits_given_as_a_list():
    config = CPTQuantConfig(bits=[4, 8])
    assert config.recipe().bits == (4, 8)
    assert config.to_dict()["bits"] == [4, 8]


@pytest.mark.parametrize("settings", [{}, MANY], ids=["default", "many"])
def test_json_round_trip(settings):
    config = CPTQuantConfig(**settings)
    data = config.to_dict()
    restored = CPTQuantConfig.from_dict(json.loads(json.dumps(data)))
    assert type(restored) is CPTQuantConfig
    assert restored.recipe() == config.recipe()
    assert restored.to_dict() == data
    assert dict(config) == data
    assert data["quant_method"] == "cptquant"


def test_to_dict_has_the_settings_as_given():
    assert CPTQuantConfig(**MANY).to_dict() == {"quant_method": "cptquant", **MANY}
    default = CPTQuantConfig().to_dict()
    assert default.keys() == {"quant_method", *MANY}
    assert (default["allocation"], default["granularity"]) == (None, None)


def test_to_dict_cannot_change_the_config():
    config = CPTQuantConfig(**copy.deepcopy(MANY))
    data = config.to_dict()
    data["dataset"].append("third text")
    data["modules_to_not_convert"].clear()
    assert config.to_dict() == {"quant_method": "cptquant", **MANY}


@pytest.mark.parametrize(
    "dataset", [torch.ones(2, 8, dtype=torch.long), [torch.ones(8)], Tokenizer()], ids=["tensor", "tensors", "object"]
)
def test_objects_become_none_in_to_dict(dataset):
    config = CPTQuantConfig(dataset=dataset, tokenizer=Tokenizer())
    data = json.loads(json.dumps(config.to_dict()))
    assert (data["dataset"], data["tokenizer"]) == (None, None)
    assert config.recipe().dataset is dataset


def test_paths_become_strings_in_to_dict(tmp_path):
    config = CPTQuantConfig(dataset=tmp_path / "texts.txt", tokenizer=tmp_path)
    data = json.loads(json.dumps(config.to_dict()))
    assert (data["dataset"], data["tokenizer"]) == (str(tmp_path / "texts.txt"), str(tmp_path))


def test_from_dict_hands_back_unused_keywords():
    config, unused = CPTQuantConfig.from_dict({"seed": 3}, return_unused_kwargs=True, device_map="auto", num_samples=4)
    assert unused == {"device_map": "auto"}
    assert (config.seed, config.num_samples) == (3, 4)


def test_from_dict_refuses_unknown_settings():
    with pytest.raises(ConfigError, match="no setting 'sede'; did you mean 'seed'"):
        CPTQuantConfig.from_dict({"quant_method": "cptquant", "sede": 3})


@pytest.mark.parametrize("settings", [{}, MANY], ids=["default", "many"])
def test_copies_and_pickles(settings):
    config = CPTQuantConfig(**settings)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is CPTQuantConfig
        assert copied.to_dict() == config.to_dict()
        assert copied.recipe() == config.recipe()


def test_deepcopy_of_a_config_with_objects():
    config = CPTQuantConfig(dataset=torch.arange(16).view(2, 8), tokenizer=Tokenizer())
    assert torch.equal(copy.deepcopy(config).dataset, config.dataset)


@pytest.mark.parametrize("settings", [{}, MANY, {"dataset": torch.ones(2, 8)}], ids=["default", "many", "tensor"])
def test_repr_shows_the_settings(settings):
    config = CPTQuantConfig(**settings)
    name, _, shown = repr(config).partition(" ")
    assert name == "CPTQuantConfig"
    assert json.loads(shown) == config.to_dict()


def test_section_of_a_checkpoint_is_kept_verbatim():
    section = {"quant_method": "compressed-tensors", "other": [1, 2], "cptquant": {"version": 1, "settings": MANY}}
    config = CPTQuantConfig.from_dict(section)
    assert type(config) is CPTQuantCheckpointConfig
    assert config.to_dict() == section
    assert config.recipe() == CPTQuantConfig(**MANY).recipe()
    expected = copy.deepcopy(section)
    section["other"].append(3)
    config.to_dict()["cptquant"].clear()
    assert config.to_dict() == expected
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.to_dict() == expected


def test_config_errors_are_value_errors_of_the_package():
    assert issubclass(ConfigError, CPTQuantError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("settings", "allocation", "granularity"),
    [
        ({}, "integer", "group"),
        ({"target_bits": 4.5}, "integer", "group"),
        ({"target_size": "300MB"}, "integer", "group"),
        ({"target_compression": 2, "granularity": "block"}, "integer", "block"),
        ({"max_loss_increase": 0.1, "estimator": "taylor"}, "integer", "group"),
        ({"allocation": "k-harmonic-means"}, "k-harmonic-means", "block"),
    ],
    ids=str,
)
def test_the_allocation_decides_the_granularity(settings, allocation, granularity):
    recipe = CPTQuantConfig(**settings).recipe()
    assert (recipe.allocation, recipe.granularity) == (allocation, granularity)
    assert recipe.estimator == ("taylor" if allocation == "integer" else "perturbation")


@pytest.mark.parametrize(
    ("text", "size"), [("300MB", 300 * 10**6), ("3GiB", 3 * 2**30), ("1.5 GB", 1_500_000_000), ("20KiB", 20 * 1024)]
)
def test_a_size_is_read_with_its_unit(text, size):
    assert CPTQuantConfig(target_size=text).recipe().target_size == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 4.5, "target_size": "1GB"}, "target_bits and target_size are two budgets; give one"),
        ({"allocation": "kmeans", "target_bits": 4.5}, "allocation='kmeans' takes no budget"),
        ({"max_loss_increase": 0.1, "method": "pmpq"}, "costs in nats, which only .* estimator='taylor' gives"),
        ({"target_runtime": "vlm"}, "'vllm-cpu', 'sglang'; did you mean 'vllm'"),
        ({"target_runtime": "vllm", "granularity": "module"}, "decide one by one; use granularity='group'"),
        (
            {"target_runtime": "vllm", "bits": (2, 3)},
            r"takes 4 and 8 bits \(4 with zero points\) and 16; bits=\[2, 3\] has",
        ),
        ({"target_runtime": "sglang", "bits": (8,), "symmetric": False}, r"bits=\[8\] has none"),
        ({"target_runtime": "vllm-cpu", "bits": (5, 8)}, r"CPUWNA16\) takes 4 bits and 16; bits=\[5, 8\] has none"),
        ({"target_runtime": "vllm", "group_size": 256}, "takes groups of -1, 32, 64 and 128, not group_size=256"),
        ({"target_runtime": "vllm", "bits_override": {"*.fc2": 3}}, r"not bits_override\['\*.fc2'\]=3"),
        ({"bits_override": {"*.fc2": 7}}, r"bits_override\['\*.fc2'\]=7 is not one of 2, 3, 4"),
        (
            {"method": "auto", "allocation": "kmeans"},
            "method='auto' compares plans of equal size: give target_bits, target_size",
        ),
        ({"method": "auto", "max_loss_increase": 0.1}, "method='auto' compares plans of equal size"),
        ({"method": "auto", "target_bits": 5, "metric": "accuracy"}, "with method='auto', whose plans are compared"),
        ({"plan": "plan.json", "target_bits": 5}, "with plan= every module is decided; leave out target_bits"),
        ({"plan": "plan.json", "bits_override": {"*": 8}}, "every module is decided; leave out bits_override"),
        ({"plan": 4}, "plan=4 must be the file of a plan, or a BitPlan"),
        ({"metric": "accuracy", "method": "cmpq"}, "metric='accuracy' cannot be had with method='cmpq'"),
        ({"metric": "perplexity", "estimator": "taylor"}, "metric='perplexity' cannot be had .* expands the loss"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        CPTQuantConfig(**settings)
