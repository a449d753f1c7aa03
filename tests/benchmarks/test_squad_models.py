"""Checkpoints, masks and tables that rows are measured with: what recovers accuracy, on what, and how often."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.squad import data as squad_data
from benchmarks.squad.checkpoints import load_model
from benchmarks.squad.models import make_models
from benchmarks.squad.options import parse_options
from benchmarks.squad.seeds import measure_seeds, spread
from benchmarks.squad.setting import read_setting
from benchmarks.squad.sweeps import Sweep, swept_variants
from benchmarks.squad.variants import table_variants
from sparse_attn import log_table
from sparse_attn.calibration import merged, rounding_error

SHORT = ("--epochs", "1", "--sparsity", "0.6")


def setting_of(*command: str):
    return read_setting(parse_options([*command]))


def query_weights(checkpoint) -> torch.Tensor:
    return load_model(checkpoint.path)[0].bert.encoder.layer[0].attention.self.query.weight


def test_finetuning_distils_unless_told_otherwise(arguments):
    command = [*arguments, "--finetune", *SHORT, "--recover-epochs", "2"]
    setting = setting_of(*command)
    assert setting.recovery.source == "cities.json, training articles"
    evaluated = {tuple(window.input_ids) for window in setting.windows}
    assert not evaluated & {tuple(example["input_ids"]) for example in setting.recovery.inputs}
    given = setting.model.qa_outputs.weight.clone()
    distilled = make_models(setting)
    assert torch.equal(setting.model.qa_outputs.weight, given)  # the setting's model is not trained
    assert len(distilled.sparse.losses) == 2 and len(distilled.dense.losses) == 1
    record = json.loads((Path(distilled.sparse.path) / "recipe.json").read_text())
    assert (record["method"], record["windows"]) == ("DistilRecipe", len(setting.recovery.inputs))

    retrained = make_models(setting_of(*command, "--recover", "retrain"))
    none = make_models(setting_of(*command[:-2], "--recover", "none"))
    assert distilled.sparse.how == "distilled on cities.json, training articles, without labels,"
    assert (retrained.sparse.how, retrained.dense.how) == ("retrained on the labels", "fine-tuned")
    assert retrained.dense.path == distilled.dense.path == none.sparse.path and retrained.dense.cached
    assert len({retrained.sparse.path, distilled.sparse.path, none.sparse.path}) == 3
    assert not torch.equal(query_weights(retrained.sparse), query_weights(distilled.sparse))
    assert make_models(setting_of(*command)).sparse.cached
    again = make_models(setting_of(*command, "--recover-epochs", "1"))
    assert not again.sparse.cached and len(again.sparse.losses) == 1


def test_any_text_can_be_distilled_on(arguments, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("the city of rome was built in year 1901 by bob .\n" * 12)
    setting = setting_of(*arguments, "--recover", "distil", "--recover-text", str(text), "--recover-epochs", "1")
    assert setting.recovery.source == "some.txt" and setting.head_windows is None
    assert [len(example["input_ids"]) for example in setting.recovery.inputs[:-1]] == [48] * 3
    models = make_models(setting)
    assert models.dense.losses is None and len(models.sparse.losses) == 1


def test_a_head_of_the_harness_is_distilled_on_what_trained_it(arguments, monkeypatch, headless_folder, data_file):
    monkeypatch.setattr("benchmarks.squad.setting.packaged_model", lambda: str(headless_folder))
    monkeypatch.setattr(squad_data, "OWN_QUESTIONS", data_file)
    setting = setting_of(*arguments[2:], "--recover", "distil")
    assert setting.recovery.source == "own questions, training articles"
    assert len(setting.recovery.inputs) == len(setting.head_windows) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recover", "distil"], "needs text that is not evaluated: pass --recover-text FILE"),
        (["--recover", "retrain"], "needs questions with answers to train on; add --finetune"),
        (["--recover-text", "some.txt"], "--recover-text is for --recover distil; this run has --recover none"),
        (["--recover", "distil", "--recover-text", "absent.txt"], "absent.txt: no such file"),
        (["--seeds", "2"], "--seeds 2: nothing is trained here"),
        (["--model", "bert-base-shape", "--table", "calibrated"], "bert-base-shape has random weights"),
        (["--recover-epochs", "2"], "--recover-epochs: this run recovers nothing"),
        (["--rounding-epochs", "2"], "--rounding-epochs is for --recover distil .* this run has --recover none"),
        (
            ["--finetune", "--rounding-epochs", "1", "--variants", "sparse-padded"],
            "has --recover distil and sparse-pad",
        ),
        (["--finetune", "--recover", "distil", "--variants", "sdpa-padded"], "--recover distil: no row has a mask"),
    ],
)
def test_what_cannot_be_recovered_is_refused_before_anything_is_trained(arguments, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        setting_of(*arguments, *options)


@pytest.mark.parametrize(("content", "message"), [(b" ", "no tokens"), (b"\xff\xfe", "not UTF-8")])
def test_text_of_no_use_is_named(arguments, tmp_path, content, message):
    text = tmp_path / "some.txt"
    text.write_bytes(content)
    with pytest.raises(ValueError, match=f"--recover-text .*some.txt: .*{message}"):
        setting_of(*arguments, "--recover", "distil", "--recover-text", str(text))


def test_tables_are_fitted_to_the_sparse_model(arguments):
    command = [*arguments, "--sparsity", "0.5", "--table"]
    kinds = ("published", "calibrated", "renormalised", "calibrated-by-layer")
    published, calibrated, renormalised, by_layer = (make_models(setting_of(*command, kind)) for kind in kinds)

    def table(models, bits):
        first, second = models.tables(bits, models.sparse)
        assert first == second
        return first

    assert table(published, 3) == log_table(3) and calibrated.tables(None, calibrated.sparse) is None
    assert table(calibrated, 3).bits == table(renormalised, 3).bits == 3
    factors = [new / old for new, old in zip(table(renormalised, 2).levels[1:], log_table(2).levels[1:])]
    assert factors == pytest.approx([factors[0]] * 3) and factors[0] != 1
    layers = calibrated.probabilities[calibrated.sparse.path]
    probabilities = merged(layers)
    errors = [rounding_error(probabilities, table(models, 2)) for models in (calibrated, renormalised, published)]
    assert errors == sorted(errors) and len(set(errors)) == 3
    real = sum(len(window.input_ids) for window in setting_of(*arguments).windows)
    assert probabilities.rows == pytest.approx(real * 2 * 2, rel=1e-5)  # layers x heads
    assert {"averages", "mask", "calibration"} == calibrated.seconds.keys()
    fitted = by_layer.tables(2, by_layer.sparse)
    assert fitted[0] != fitted[1]
    for layer, own in zip(layers, fitted, strict=True):
        assert rounding_error(layer, own) < rounding_error(layer, table(calibrated, 2))


def test_rows_with_bits_are_distilled_further_through_rounding(arguments):
    command = [*arguments, "--finetune", *SHORT, "--recover-epochs", "1", "--bits", "2", "--table", "calibrated"]
    command += ["--rounding-epochs", "2"]
    plain, rounded = table_variants(["sparse-unpadded", "sparse-unpadded+bits"], ["element"], 2)
    swept = swept_variants(Sweep("bits", [2]), ["element"])[0]
    models = make_models(setting_of(*command, "--variants", "sparse-unpadded,sparse-unpadded+bits"))
    assert models.rounded.path != models.sparse.path and len(models.rounded.losses) == 2
    assert not torch.equal(query_weights(models.rounded), query_weights(models.sparse))
    chosen = [models.checkpoint(one) for one in (plain, rounded, swept, table_variants(["sdpa-sorted"], [], None)[0])]
    assert chosen == [models.sparse, models.rounded, models.sparse, models.dense]
    tables = {models.tables(2, checkpoint) for checkpoint in (models.sparse, models.rounded)}
    assert len(tables) == 2 and models.probabilities.keys() == {models.sparse.path, models.rounded.path}
    published = make_models(setting_of(*command, "--table", "published"))
    assert published.sparse.path == models.sparse.path != published.rounded.path != models.rounded.path
    others = make_models(setting_of(*command, "--rounding-epochs", "0"))
    assert others.rounded is None and others.checkpoint(rounded) == others.sparse


def test_each_seed_draws_its_own_head_and_order(arguments, headless_folder):
    command = [*arguments, "--model", str(headless_folder), "--finetune", *SHORT, "--recover-epochs", "1"]
    setting = setting_of(*command)
    first, second = (make_models(setting, seed) for seed in (0, 1))
    assert first.dense.path != second.dense.path and first.sparse.path != second.sparse.path
    alone = make_models(setting_of(*command, "--seed", "1"))
    assert alone.dense.path == second.dense.path and alone.dense.cached
    assert alone.sparse.path == second.sparse.path and alone.mask == second.mask


def rows(em: float, f1: float | None, seconds: float = 1.0) -> list[dict]:
    return [{"variant": "dense", "em": em, "f1": f1, "seconds": seconds}, {"variant": "sparse", "em": em - 1}]


def test_spread_over_seeds():
    first, second = spread([rows(50, 60.0), rows(53, 64.0, 9.0), rows(56, 65.0, 9.0)])
    assert (first["em"], first["f1"], first["seconds"]) == (53, 63, 1.0)
    assert first["em_spread"] == {"mean": 53, "deviation": 3, "lowest": 50, "highest": 56, "values": [50, 53, 56]}
    assert first["f1_spread"]["deviation"] == pytest.approx(7**0.5)
    assert second["em"] == 52 and "f1_spread" not in second
    assert "f1_spread" not in spread([rows(50, None), rows(51, None)])[0]
    assert spread([rows(50, 60.0)]) == rows(50, 60.0)


def test_a_row_that_a_seed_lacks_has_fewer_values():
    first, second = spread([rows(50, 60.0), rows(60, 70.0)[:1], rows(70, 80.0)[::-1]])
    assert first["em_spread"]["values"] == [50, 60, 70]
    assert second["em_spread"]["values"] == [49, 69] and second["em"] == 59
    assert spread([rows(50, 60.0), []]) == rows(50, 60.0)


def test_time_is_measured_with_the_first_seed_only(monkeypatch, arguments):
    seen = []
    monkeypatch.setattr("benchmarks.squad.seeds.make_models", lambda setting, seed: (seed, setting))
    setting = setting_of(*arguments, "--granularity", "element,tile", "--repeats", "5", "--seed", "4")
    setting.options.seeds = 3

    def measure(setting, models):
        (seed, element), (other, tile) = models.values()
        assert seed == other and element.granularities + tile.granularities == [*models]
        seen.append((seed, setting.options.repeats, setting.model))
        return rows(seed, 60.0)

    models, measured = measure_seeds(setting, measure)
    assert seen == [(4, 5, None), (5, 1, None), (6, 1, None)]
    assert [*models] == ["element", "tile"] and models["tile"][0] == 4
    assert measured[0]["em_spread"]["values"] == [4, 5, 6]
