"""Config and weights that do not belong together are refused at the tensor or field that shows it."""

import hashlib
import json

import numpy as np
import pytest

from moerge import table
from moerge.errors import AdapterInvalid, ConfigInvalid
from moerge.tensors import adapters, files, header, kinds, saving
from moerge.tensors.kind import Layout, LowRank

Q, V = "layer.0.query", "layer.0.value"
KEY = "base_model.model.{}.lora_{}.weight"


@pytest.fixture
def make(tmp_path):
    """Write tensors, return (config, header, path); a tensor given as None is left out."""

    def made(changes=(), /, **fields):
        rng = np.random.default_rng(0)
        tensors = {}
        for module in (Q, V):
            tensors[KEY.format(module, "A")] = rng.normal(size=(2, 6)).astype(np.float32)
            tensors[KEY.format(module, "B")] = rng.normal(size=(4, 2)).astype(np.float32)
        tensors |= dict(changes)
        path = tmp_path / "adapter_model.safetensors"
        files.write(path, {name: value for name, value in tensors.items() if value is not None})
        raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["query", "value"], **fields}
        return adapters.parse_config(json.dumps(raw).encode()), header.read(path), path

    return made


def ones(*shape):
    return np.ones(shape, np.float32)


def refused(made) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        adapters.check(*made[:2])
    assert caught.value.remedy
    assert str(caught.value.met) in caught.value.detail
    return caught.value


def test_the_facts_of_a_good_adapter(make):
    config, head, _ = make(alpha_pattern={"value": 5})
    facts = adapters.check(config, head)
    assert facts.kind == "lora"
    assert facts.modules == (Q, V)
    assert facts.targets == ("query", "value")
    assert facts.ranks == {Q: 2, V: 2}
    assert facts.rank == 2
    assert facts.scalings == {Q: 1.5, V: 2.5}
    assert facts.shapes == {Q: (4, 6), V: (4, 6)}
    assert facts.n_parameters == 2 * (12 + 8)
    assert facts.layouts == {Q: Layout(), V: Layout()}
    assert (facts.saved, facts.biases, facts.blockers, facts.warnings, facts.is_mergeable) == ((), (), (), (), True)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_that_disagrees_with_the_weights_is_refused(make, rank):
    error = refused(make(r=rank))
    assert (error.pointer, error.met) == (KEY.format(Q, "A"), 2)
    assert error.wanted == f"{rank}, from r or rank_pattern in adapter_config.json"
    assert error.rule == "T4"


def test_a_rank_pattern_that_disagrees_with_the_weights_is_refused(make):
    error = refused(make(rank_pattern={"value": 3}))
    assert error.pointer == KEY.format(V, "A")
    assert error.wanted.startswith("3")


def test_factors_of_different_ranks_are_refused(make):
    error = refused(make({KEY.format(Q, "B"): ones(4, 3)}))
    assert (error.pointer, error.met) == (KEY.format(Q, "A"), "A [2, 6], B [4, 3]")


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_module_without_one_of_its_factors_is_refused(make, factor):
    error = refused(make({KEY.format(Q, factor): None}))
    assert (error.pointer, error.wanted) == (Q, f"also lora_{factor}")


@pytest.mark.parametrize("shapes", [((2,), (4, 2)), ((2, 6), (4,)), ((2, 6, 3), (4, 2)), ((2, 6, 3), (4, 2, 3))])
def test_factors_that_are_no_matrices_and_no_kernels_are_refused(make, shapes):
    changes = {KEY.format(Q, "A"): ones(*shapes[0]), KEY.format(Q, "B"): ones(*shapes[1])}
    assert refused(make(changes)).pointer == KEY.format(Q, "A")


def test_a_module_that_the_config_does_not_target_is_refused(make):
    error = refused(make(target_modules=["query"]))
    assert (error.pointer, error.met) == (KEY.format(V, "A"), V)
    assert error.wanted == "a module of target_modules ['query']"
    assert adapters.check(*make(target_modules=r"layer\.\d+\.(query|value)")[:2]).modules == (Q, V)
    assert refused(make(target_modules=r"layer\.\d+\.(query|key)")).met == V


def test_a_pattern_that_takes_for_ever_is_refused_as_the_configs_fault(make):
    config, head, _ = make(target_modules="(?!x)" + ".*" * 9900 + "y")
    with pytest.raises(ConfigInvalid) as caught:
        adapters.check(config, head)
    assert (caught.value.pointer, caught.value.rule) == ("/target_modules", "J3")


@pytest.mark.parametrize(
    "name", ["layer.0.query.lora_A.weight", "base_model.model.layer.0.query.weight", "base_model.model.layer.0.query.lora_C.weight",
             "base_model.model.layer.0.query.lora_A.bias", "base_model.model.layer.0.query.ia3_l", "x"],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused(make, name):
    error = refused(make({name: ones(2, 6)}))
    assert (error.pointer, error.met) == (name, name)
    assert "lora_A.weight" in error.wanted
    assert "one and the same adapter" in error.remedy


def test_a_saved_module_without_pefts_prefix_is_refused(make):
    error = refused(make({"head.weight": ones(2)}, modules_to_save=["head"]))
    assert error.pointer == "head.weight"
    assert error.wanted.startswith("a name that starts with base_model.model.")


def test_a_file_without_any_tensor_of_its_kind_is_refused(make):
    changes = {KEY.format(module, factor): None for module in (Q, V) for factor in "AB"}
    config, head, _ = make({**changes, "base_model.model.head.weight": ones(2)}, modules_to_save=["head"])
    assert refused((config, head)).pointer == "/peft_type"


def test_an_unknown_kind_of_adapter_is_refused_with_the_known_ones(make):
    error = refused(make(peft_type="lora"))
    assert (error.pointer, error.met) == ("/peft_type", "lora")
    assert "LORA" in error.wanted
    assert "capitals" in error.remedy


def test_shapes_that_do_not_fit_the_base_are_refused_where_the_base_is_known(make):
    config, head, _ = make()
    assert adapters.check(config, head, base_shapes={Q: (4, 6), "other": (1, 1)})
    with pytest.raises(AdapterInvalid) as caught:
        adapters.check(config, head, base_shapes={V: (6, 4)})
    assert (caught.value.pointer, caught.value.met, caught.value.wanted) == (V, [4, 6], "[6, 4] (out, in)")


MAGNITUDE = f"base_model.model.{Q}.lora_magnitude_vector"


def test_config_and_weights_must_agree_about_dora(make):
    assert refused(make(use_dora=True)).met == "use_dora True and no magnitude"
    assert refused(make({MAGNITUDE: ones(4)})).met == "use_dora False and a magnitude"
    both = {MAGNITUDE: ones(4), MAGNITUDE.replace("query", "value"): ones(4)}
    facts = adapters.check(*make(both, use_dora=True)[:2])
    assert [blocker.pointer for blocker in facts.blockers] == ["/use_dora"]
    assert refused(make(both | {MAGNITUDE: ones(5)}, use_dora=True)).pointer == MAGNITUDE


def test_one_tensor_under_two_spellings_is_refused(make):
    error = refused(make({MAGNITUDE: ones(4), f"{MAGNITUDE}.weight": ones(4)}, use_dora=True))
    assert "twice" in error.detail


def test_a_bias_on_b_and_its_setting_go_together(make):
    names = [f"base_model.model.{module}.lora_B.bias" for module in (Q, V)]
    both = {name: ones(4) for name in names}
    assert refused(make(both)).met == "lora_bias None and a bias on B"
    assert refused(make({names[0]: ones(4)}, lora_bias=True)).pointer == KEY.format(V, "B")
    error = refused(make(both | {names[1]: ones(3)}, lora_bias=True))
    assert (error.pointer, error.met, error.wanted) == (names[1], [3], [4])
    config, head, path = make(both, lora_bias=True, alpha_pattern={"value": 5})
    facts = adapters.check(config, head)
    assert (facts.biased, facts.blockers) == ((Q, V), ())
    adapter = adapters.load(config, path)
    assert {name: values.tolist() for name, values in adapter.biases.items()} == {Q: [1.5] * 4, V: [2.5] * 4}


def test_saved_modules_and_biases_are_told_from_factors(make):
    changes = {"base_model.model.head.dense.weight": ones(3, 3), "base_model.model.layer.0.norm.bias": ones(3)}
    facts = adapters.check(*make(changes, modules_to_save=["head"], bias="all")[:2])
    assert facts.saved == ("base_model.model.head.dense.weight",)
    assert facts.biases == ("base_model.model.layer.0.norm.bias",)
    assert facts.modules == (Q, V)
    assert {blocker.pointer for blocker in facts.blockers} == {"/modules_to_save", "/bias"}
    assert refused(make(changes, modules_to_save=["head"])).pointer == "base_model.model.layer.0.norm.bias"


def test_a_stored_embedding_blocks_a_merge_unless_it_is_itself_a_target(make):
    stored = {"base_model.model.lm_head.weight": ones(5, 6)}
    facts = adapters.check(*make(stored)[:2])
    assert facts.saved == ("base_model.model.lm_head.weight",)
    assert [item.pointer for item in facts.blockers] == ["base_model.model.lm_head.weight"]
    assert "save_embedding_layers" in facts.blockers[0].remedy
    copy = {
        "base_model.model.embed_tokens.base_layer.weight": ones(5, 6),
        "base_model.model.embed_tokens.lora_embedding_A": ones(2, 5),
        "base_model.model.embed_tokens.lora_embedding_B": ones(6, 2),
    }
    facts = adapters.check(*make(copy, target_modules=["query", "value", "embed_tokens"])[:2])
    assert facts.blockers == ()
    assert "embed_tokens.base_layer.weight" in facts.warnings[0]
    assert facts.shapes["embed_tokens"] == (6, 5)
    assert facts.layouts["embed_tokens"] == Layout("embedding")


def test_half_an_embedding_pair_is_refused(make):
    names = {"base_model.model.e.lora_embedding_A": ones(2, 5), KEY.format("e", "B"): ones(6, 2)}
    assert refused(make(names, target_modules=["query", "value", "e"])).wanted == "also lora_embedding_B"
    both = names | {"base_model.model.e.lora_embedding_B": ones(6, 2)}
    assert refused(make(both, target_modules=["query", "value", "e"])).wanted == "one pair"


def test_a_grouped_convolution_is_kept_and_not_merged(make):
    changes = {KEY.format(Q, "A"): ones(2, 3, 3), KEY.format(Q, "B"): ones(4, 1, 1)}
    facts = adapters.check(*make(changes)[:2])
    assert [item.pointer for item in facts.blockers] == [KEY.format(Q, "B")]


def test_modules_are_read_with_their_scaling(make):
    config, _, path = make(alpha_pattern={"value": 5})
    adapter = adapters.load(config, path)
    assert list(adapter.modules) == [Q, V]
    assert len(adapter.modules) == 2
    assert Q in adapter.modules
    assert "other" not in adapter.modules
    with files.open_file(path) as file:
        wanted = 2.5 * file.float32(KEY.format(V, "B")) @ file.float32(KEY.format(V, "A"))
    assert np.allclose(adapter.modules[V].delta(), wanted, atol=1e-6)
    assert adapter.modules[V].rank == 2
    assert adapter.modules[V].shape == (4, 6)


def test_the_scaling_of_rslora_divides_by_the_root_of_the_modules_own_rank(make):
    changes = {KEY.format(V, "A"): ones(4, 6), KEY.format(V, "B"): ones(4, 4)}
    config, head, _ = make(changes, use_rslora=True, lora_alpha=6, rank_pattern={"value": 4})
    assert adapters.check(config, head).scalings == pytest.approx({Q: 6 / 2**0.5, V: 3.0})


def test_loading_what_cannot_be_merged_says_why_and_can_be_told_to_go_on(make):
    config, _, path = make({"base_model.model.head.weight": ones(2)}, modules_to_save=["head"])
    with pytest.raises(AdapterInvalid) as caught:
        adapters.load(config, path)
    assert caught.value.pointer == "/modules_to_save"
    assert "head" in caught.value.met
    assert caught.value.remedy
    adapter = adapters.load(config, path, accept=["/modules_to_save"])
    assert adapter.facts.saved == ("base_model.model.head.weight",)
    assert {name: values.tolist() for name, values in adapter.saved.items()} == {"head.weight": [1, 1]}


def test_a_kind_without_a_delta_cannot_be_told_to_go_on(make):
    names = {KEY.format(module, factor): None for module in (Q, V) for factor in "AB"}
    config, _, path = make({**names, f"base_model.model.{Q}.oft_R.weight": ones(4, 1)}, peft_type="OFT")
    with pytest.raises(AdapterInvalid, match="rotates"):
        adapters.load(config, path, accept=["/peft_type"])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq"])
def test_an_initialisation_that_changes_the_base_blocks_a_merge(make, start):
    blockers = adapters.check(*make(init_lora_weights=start)[:2]).blockers
    assert [(item.pointer, item.met) for item in blockers] == [("/init_lora_weights", start)]
    assert "plain LoRA" in blockers[0].remedy


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_blocks_nothing(make, start):
    assert adapters.check(*make(init_lora_weights=start)[:2]).is_mergeable


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_replication", [[0, 2]]), ("megatron_config", {}), ("alora_invocation_tokens", [1]), ("use_qalora", True),
     ("use_bdlora", {}), ("arrow_config", {}), ("kasa_config", {}), ("trainable_token_indices", [1]),
     ("target_parameters", ["a.weight"]), ("modules_to_save", ["x"]), ("bias", "lora_only")],
)  # fmt: skip
def test_a_setting_that_changes_the_forward_pass_blocks_a_merge_by_name(make, field, value):
    blockers = adapters.check(*make(**{field: value})[:2]).blockers
    assert [item.pointer for item in blockers] == [f"/{field}"]
    assert adapters.check(*make(**{field: None})[:2]).is_mergeable


@pytest.mark.parametrize(
    "fields", [{"lora_dropout": 0.5}, {"velora_config": {}}, {"runtime_config": {"ephemeral_gpu_offload": True}},
               {"auto_mapping": {"parent_library": "os"}}, {"never_heard_of": {"a": 1}}, {"revision": "../../x"},
               {"megatron_core": "megatron.core"}, {"layer_replication": []}],
)  # fmt: skip
def test_a_setting_without_effect_or_an_unknown_one_blocks_nothing(make, fields):
    config, head, _ = make(**fields)
    assert adapters.check(config, head).is_mergeable
    assert config.raw.items() >= fields.items()


def test_the_digest_is_made_of_those_of_the_two_files(make):
    config, _, path = make()
    adapter = adapters.load(config, path)
    # As `make` writes the config.
    of_config = hashlib.sha256(json.dumps(dict(config.raw)).encode()).hexdigest()
    of_weights = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = hashlib.sha256(f"{of_weights}\n{of_config}".encode()).hexdigest()
    assert adapter.digest == wanted
    assert adapters.load(make(lora_alpha=4)[0], path).digest != wanted
    config, _, path = make({KEY.format(Q, "A"): ones(2, 6)})
    assert adapters.load(config, path).digest != wanted


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_in_every_dtype(make, dtype, value):
    values = np.ones((2, 6), np.float32)
    values[1, 3] = value
    name = KEY.format(V, "A")
    _, head, path = make({name: files.to_dtype(values, dtype)})
    with pytest.raises(AdapterInvalid) as caught:
        adapters.scan_finite(path, head)
    assert (caught.value.pointer, caught.value.met, caught.value.wanted) == (
        name,
        f"{value} at position 9",
        "finite values",
    )
    assert "checkpoint" in caught.value.remedy


def test_the_largest_and_smallest_finite_values_pass(make):
    single = np.array([[3.4028235e38, -3.4028235e38, 1e-45, -0.0, 0, 1]] * 2, np.float32)
    half = np.array([[65504, -65504, 6e-8, 0, 1, 2]] * 2, np.float16)
    brain = files.BF16(np.array([[0x7F7F, 0xFF7F, 1, 0x8000, 0, 2]] * 2, np.uint16))
    _, head, path = make({KEY.format(Q, "A"): single, KEY.format(V, "A"): half, "base_model.model.x": brain})
    assert adapters.scan_finite(path, head) == ()


def test_a_value_late_in_a_large_tensor_is_found_at_its_place(make):
    values = np.zeros((2, 5_000_000), np.float32)
    values[1, 4_999_999] = np.inf
    _, head, path = make({KEY.format(Q, "A"): values})
    with pytest.raises(AdapterInvalid, match="position 9999999"):
        adapters.scan_finite(path, head)


@pytest.mark.parametrize("position", [0, -1])
def test_a_factor_with_one_value_anywhere_is_not_taken_for_untrained(make, position):
    values = np.zeros((5_000_000, 2), np.float32)
    values.ravel()[position] = 1
    _, head, path = make({KEY.format(Q, "B"): values})
    assert adapters.scan_finite(path, head) == ()


def test_factors_that_training_never_moved_are_warned_about(make):
    zero = np.zeros((4, 2), np.float32)
    _, head, path = make({KEY.format(Q, "B"): zero})
    assert adapters.scan_finite(path, head) == (
        f"1 of 2 modules have a factor that is all zero (untrained), such as {KEY.format(Q, 'B')}.",
    )
    _, head, path = make({KEY.format(Q, "B"): zero, KEY.format(V, "B"): -zero})
    assert "changes nothing" in adapters.scan_finite(path, head)[0]


def test_the_first_factor_may_be_zero(make):
    _, head, path = make({KEY.format(Q, "A"): np.zeros((2, 6), np.float32)})
    assert adapters.scan_finite(path, head) == ()


def read_back(folder):
    config = adapters.parse_config((folder / saving.CONFIG).read_bytes())
    return adapters.load(config, folder / saving.WEIGHTS)


@pytest.mark.parametrize(("dtype", "error"), [("F32", 1e-6), ("F16", 2e-3), ("BF16", 2e-2)])
def test_what_is_saved_is_loaded_with_scaling_one_and_one_rank(tmp_path, dtype, error):
    rng = np.random.default_rng(1)
    given = {
        Q: (rng.normal(size=(4, 3)), rng.normal(size=(3, 6))),
        V: (rng.normal(size=(5, 1)), rng.normal(size=(1, 2))),
    }
    adapters.save_lora(
        tmp_path, given, base_model="a/b", dtype=dtype, extra={"task_type": "FEATURE_EXTRACTION", "r": 99}
    )
    adapter = read_back(tmp_path)
    assert adapter.facts.ranks == {Q: 3, V: 3}
    assert adapter.facts.scalings == {Q: 1.0, V: 1.0}
    assert adapter.config.base_model_name_or_path == "a/b"
    assert adapter.config.raw["task_type"] == "FEATURE_EXTRACTION"
    for module, (B, A) in given.items():
        assert np.abs(adapter.modules[module].delta() - B @ A).max() < error * 5
    with files.open_file(tmp_path / saving.WEIGHTS) as file:
        assert {info.dtype for info in file.header.tensors.values()} == {dtype}
        assert file.metadata == {"format": "pt"}


def test_saving_twice_gives_the_same_bytes_and_the_input_stays(tmp_path):
    B, A = ones(4, 2), ones(2, 6)
    for folder in ("a", "b"):
        adapters.save_lora(tmp_path / folder, {V: (B, A), Q: (B[:, :1], A[:1])}, base_model=None)
    for name in (saving.CONFIG, saving.WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert B.shape == (4, 2)


def test_embeddings_and_convolutions_are_saved_in_their_own_form(tmp_path):
    layouts = {"e": Layout("embedding"), "c": Layout("conv", (3, 2, 2))}
    given = {"e": (ones(6, 1), ones(1, 9)), "c": (ones(4, 2), ones(2, 12)), "l": (ones(4, 2), ones(2, 6))}
    adapters.save_lora(tmp_path, given, base_model=None, layouts=layouts)
    with files.open_file(tmp_path / saving.WEIGHTS) as file:
        shapes = {name.removeprefix("base_model.model."): info.shape for name, info in file.header.tensors.items()}
    assert shapes == {
        "e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (6, 2), "c.lora_A.weight": (2, 3, 2, 2),
        "c.lora_B.weight": (4, 2, 1, 1), "l.lora_A.weight": (2, 6), "l.lora_B.weight": (4, 2),
    }  # fmt: skip
    adapter = read_back(tmp_path)
    assert adapter.facts.layouts == layouts | {"l": Layout()}
    assert adapter.modules["e"].weight_delta().shape == (9, 6)
    assert adapter.modules["c"].weight_delta().shape == (4, 3, 2, 2)
    assert adapter.modules["l"].weight_delta(fan_in_fan_out=True).shape == (6, 4)
    assert adapter.modules["l"].weight_delta().shape == (4, 6)


def test_a_value_too_large_for_the_dtype_is_refused_and_not_saved_as_infinity(tmp_path):
    with pytest.raises(AdapterInvalid) as caught:
        adapters.save_lora(tmp_path, {Q: (ones(4, 2) * 70_000, ones(2, 6))}, base_model=None, dtype="F16")
    assert (caught.value.pointer, caught.value.met) == (KEY.format(Q, "B"), 70_000.0)
    assert "bfloat16" in caught.value.remedy
    assert not (tmp_path / saving.WEIGHTS).exists()


@pytest.mark.parametrize("pair", [((4, 2), (3, 6)), ((4,), (2, 6)), ((4, 2, 1), (2, 6))])
def test_factors_that_do_not_fit_cannot_be_saved(tmp_path, pair):
    with pytest.raises(ValueError, match="wanted"):
        adapters.save_lora(tmp_path, {Q: (ones(*pair[0]), ones(*pair[1]))}, base_model=None)
    with pytest.raises(ValueError, match="at least one module"):
        adapters.save_lora(tmp_path, {}, base_model=None)


def test_every_kind_says_what_its_tensors_are_called():
    found = adapters.catalogue()
    assert len(found) == len(table.load(kinds))
    for peft_type, kind in found.items():
        assert kind.peft_type == peft_type == peft_type.upper()
        assert kind.endings or kind.markers
        assert (kind.delta is None) == (kind.check is None)


def test_a_delta_is_scaling_times_b_times_a():
    found = LowRank(A=np.array([[1, 2, 3]], np.float32), B=np.array([[1], [10]], np.float32), scaling=0.5)
    assert found.delta().tolist() == [[0.5, 1, 1.5], [5, 10, 15]]
    assert found.delta().dtype == np.float32
